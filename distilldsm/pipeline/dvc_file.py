"""Generates dvc.yaml from the stages' records. `python -m distilldsm.pipeline.dvc_file` writes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilldsm.components.registry import STAGES
from distilldsm.config import Params
from distilldsm.core.errors import UserError
from distilldsm.core.stage import Input, Output, Stage

HEAD = """\
# Written by: python -m distilldsm.pipeline.dvc_file, from the records in distilldsm/components. Do not edit it by hand.
# A stage runs again when its parameters in params.yaml, its code or its input change. The stages train, evaluate and
# export run once for each fold in cv.folds. cross_validate waits for all folds, because it reads the folders that hold
# their outputs. There it reads only the folds of cv.folds.
# Metrics and plots are in DVC's cache, like all outputs, and not in git. `dvc exp show` and `dvc plots diff` find those
# of each experiment there.
"""


def run_dvc(*arguments: str) -> None:
    """Run a DVC command.

    Raises:
        UserError: the command fails.
    """
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError("the DVC command failed", where=" ".join(["dvc", *arguments]), seen=done.stderr.strip()[-400:])


def dvc_yaml(stages: Sequence[Stage] = STAGES) -> str:
    """The text of dvc.yaml."""
    import yaml

    definitions = {stage.name: _per_fold(stage) if stage.per_fold else _definition(stage) for stage in stages}
    return HEAD + yaml.safe_dump({"stages": definitions}, sort_keys=False, width=120)


def _per_fold(stage: Stage) -> dict[str, Any]:
    return {"foreach": "${cv.folds}", "do": _definition(stage)}


def _definition(stage: Stage) -> dict[str, Any]:
    outputs = [out for out in stage.outputs if not (out.metric or out.plot)]
    directory, shown = outputs[0], [out for out in stage.outputs if out.metric or out.plot]
    parts = [f"{directory.path}/{part}" for part in directory.parts] if shown else [directory.path]
    definition = {
        "desc": stage.help,
        "cmd": f"python -m {stage.run.__module__}{' --fold {fold}' if stage.per_fold else ''}",
        "params": [stage.section, *stage.also],
        "deps": [*_code(stage), *(path for one in stage.inputs for path in _read(one))],
        "outs": parts,
        "metrics": [out.path for out in shown if out.metric],
        "plots": [_plot(out) for out in shown if out.plot],
    }
    filled: dict[str, Any] = _with_item({key: value for key, value in definition.items() if value})
    return filled


def _code(stage: Stage) -> list[str]:
    """The code that a stage depends on, and the input files that its parameters name by default."""
    defaults = getattr(Params(), stage.section)
    named = [f"${{{stage.section}.{name}}}" for name in stage.files if getattr(defaults, name) is not None]
    return [f"distilldsm/{path}" for path in stage.code_paths] + named


def _read(one: Input) -> list[str]:
    """The paths that a stage depends on: files that are outputs of their own, else the whole output that holds them.

    `dvc repro --pull` would fetch a part of an output, and then take the output for complete.
    """
    whole = [stage.output.path for stage in STAGES if not any(out.metric or out.plot for out in stage.outputs)]
    paths = [f"{one.path}/{file}" for file in one.files.values()] or [one.path]
    return list(dict.fromkeys(next((out for out in whole if path.startswith(f"{out}/")), path) for path in paths))


def _plot(out: Output) -> dict[str, Any]:
    assert out.plot is not None
    return {out.path: {key: value for key, value in vars(out.plot).items() if value is not None}}


def _with_item(value: Any) -> Any:
    """Replace `{fold}` with DVC's `${item}`."""
    if isinstance(value, dict):
        return {_with_item(key): _with_item(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_item(inner) for inner in value]
    return value.replace("{fold}", "${item}")


if __name__ == "__main__":
    Path("dvc.yaml").write_text(dvc_yaml(), encoding="utf-8")
