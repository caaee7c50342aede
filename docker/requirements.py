"""Prints the requirements of a role's image, one per line: `requirements.py ROLE pyproject.toml`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = {"data": "data", "train": "train", "export": "export", "mlflow": "services"}
LEFT_OUT = {
    "data": {"openvino"},  # only predict and export use it
    "train": {"openvino", "mlflow"},
    "export": set(),
    "mlflow": {"dvc-s3"},
}
# mlflow-skinny logs to a server. With the two SQL packages it also opens SQLite, at a quarter of mlflow's size.
MLFLOW = ["mlflow-skinny", "sqlalchemy", "alembic", "pandas"]
# kubeflow starts a TrainJob from the pipeline's train step.
ADDED = {"data": [], "train": [*MLFLOW, "kubeflow"], "export": MLFLOW, "mlflow": []}


def requirements(role: str, project: Path) -> list[str]:
    """The requirements of a role. The Dockerfile installs torch before them, in the build that it selects."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    own = [] if role == "mlflow" else table["dependencies"]  # the server does not contain distilldsm
    wanted = [*own, *table["optional-dependencies"][EXTRAS[role]], *ADDED[role]]
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower(): line for line in wanted}
    return [line for name, line in names.items() if name not in LEFT_OUT[role]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], Path(sys.argv[2]))))
