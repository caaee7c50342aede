"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
OFFLINE = REPOSITORY / "tests/offline"
"""The folder that keeps a test's processes on this machine, if PYTHONPATH has it."""

# Now, and not in a fixture: what is imported at the top of a test must not call anyone either.
CALLS = Path(tempfile.mkstemp(prefix="calls-")[1])
os.environ["OFFLINE_TEST_CALLS"] = str(CALLS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(OFFLINE), os.environ.get("PYTHONPATH"))))
import tests.offline.sitecustomize  # noqa: E402, F401


@pytest.fixture(autouse=True)
def _calls_nobody() -> Iterator[None]:
    """Fail the test if it, or a process that it started, tried to reach another machine."""
    yield
    if text := CALLS.read_text():
        CALLS.write_text("")
        pytest.fail(text)


@pytest.fixture(autouse=True)
def _credentials_of_this_test() -> Iterator[None]:
    """Undo what the product does with an address that holds a password: it moves it to these variables."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PGUSER", "PGPASSWORD")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first: of two workers, neither is left with one of them when the other has done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def _exports_without_coverage() -> Iterator[None]:
    """Coverage follows every call: torch's exporter, 20 million of them, takes half as long again."""
    from distilldsm.export import onnx_export

    quiet = onnx_export._quiet

    @contextmanager
    def untraced() -> Iterator[None]:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            with quiet():
                yield
        finally:
            sys.settrace(tracer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_quiet", untraced)
        yield


def _shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"real data set {name} is not on this machine (looked in ../shared/data)")
    return path


@pytest.fixture(scope="session")
def hippocampus_archive() -> Path:
    return _shared("Task04_Hippocampus.tar")


@pytest.fixture(scope="session")
def acdc_archive() -> Path:
    return _shared("Dataset127_ACDC.tar")


@pytest.fixture(scope="session")
def brats2015_archive() -> Path:
    return _shared("BraTS2015_subset.tar")
