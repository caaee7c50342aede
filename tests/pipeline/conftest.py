"""Fixtures of the tests that compile pipelines."""

from __future__ import annotations

import inspect

import pytest


@pytest.fixture(autouse=True)
def _stacks_without_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """KFP asks for the whole stack to learn the name of a function.

    Finding the source line of each frame, which nobody looks at, takes a minute where many modules are loaded.
    """
    whole = inspect.stack
    monkeypatch.setattr(inspect, "stack", lambda context=1: whole(0))
