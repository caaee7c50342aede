"""Patterns of file names that would search for hours."""

from __future__ import annotations

import pytest

from distilldsm.core.errors import DataError
from distilldsm.data import patterns
from distilldsm.data.layouts import _patient
from distilldsm.data.patterns import matches


def test_a_pattern_gets_a_second_for_each_name(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS_PER_NAME", 0.2)
    with pytest.raises(DataError, match=r"a pattern takes too long(.|\n)*simpler pattern"):
        matches("*a*a*a*a*a*a*a*a*a{case}b", ["a" * 200])
    with pytest.raises(DataError, match="a pattern takes too long") as caught:
        _patient("a" * 40, r"((\w+)+)+!")
    assert caught.value.seen == r"((\w+)+)+!"
    assert _patient("p1_c2", r"(p\d+)_") == "p1"
