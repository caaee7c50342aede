"""Fixtures of the tests of faults."""

from __future__ import annotations

import pytest

from tests.export.fake import Exported, exported
from tests.faults.payloads import canary

__all__ = ["canary"]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory)
