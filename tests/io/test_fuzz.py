"""Damaged DICOM series and NIfTI files: a scan or one of our errors, no traceback and no hang."""

from __future__ import annotations

import os
import time

import pytest

pytest.importorskip("pydicom", reason="needs the optional group 'dicom'")

from benchmarks.fuzz import run


def test_damaged_files_give_a_scan_or_an_error():
    """For a minute in CI, else a few hundred inputs."""
    in_ci = bool(os.environ.get("CI"))
    first = int(time.time()) * 1000  # other inputs each time; an input depends on its number only
    failed: list[str] = []
    found = run(
        range(first, first + (100_000 if in_ci else 400)),
        60 if in_ci else float("inf"),
        lambda number, error: failed.append(f"python -m benchmarks.fuzz --only {number}: {error!r}"),
    )
    assert not failed, "\n".join(failed[:5])
    assert found["series read"]
    assert found["NIfTI read"]
    assert len(found) > 10, "the damages are of many kinds"
