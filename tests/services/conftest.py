"""`servers`, started once for all tests of this folder, and `job`: a pipeline whose outputs are published to them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.dvc_run import tutorial
from tests.services.servers import Servers, running

ELSEWHERE = ("MLFLOW_TRACKING", "AWS_", "PG", "DISTILLDSM_TRACKING")


@dataclass(kw_only=True)
class Job:
    """A repository, and what its commands have printed."""

    place: Path
    said: list[str] = field(default_factory=list)

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the repository; of the servers it knows what is given."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(ELSEWHERE)}
        known |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.place),
            "OMP_NUM_THREADS": "1",
            "DO_NOT_TRACK": "1",
            "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
        }
        done = subprocess.run(
            command, cwd=self.place, env=known | environment, capture_output=True, text=True, timeout=1500, check=False
        )
        self.said += [done.stdout, done.stderr]
        assert not check or done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with running() as found:
        yield found


@pytest.fixture(scope="session")
def job(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The tutorial's outputs, published to the servers; of these it knows MLflow's user and password only."""
    made = Job(place=tutorial(tmp_path_factory) / "copy")
    made.run("distilldsm", "publish", "--to", servers.mlflow_url, **servers.tracking())
    return made
