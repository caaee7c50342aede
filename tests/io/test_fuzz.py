"""Damaged DICOM series and NIfTI files: a scan or one of our errors, no traceback and no hang."""

from __future__ import annotations

import os
import time

import pytest

pytest.importorskip("pydicom", reason="needs the optional group 'dicom'")

from benchmarks.fuzz import run


def test_damaged_files_give_a_scan_or_an_error():
    failed: list[str] = []
    first = int(time.time()) % 1_000_000 * 1000  # other inputs each time; an input depends on its number only
    found = run(
        range(first, first + 100_000),
        60 if os.environ.get("CI") else 5,
        lambda number, error: failed.append(
            f"python -m benchmarks.fuzz --only {number}: {type(error).__name__}: {error}"
        ),
    )
    assert not failed, "\n".join(failed[:5])
    assert found["series read"]
    assert found["NIfTI read"]
    assert len(found) > 10, "the damages are of many kinds"
