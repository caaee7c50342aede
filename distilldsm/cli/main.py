"""The command `distilldsm`: the table of its commands, and the one place that runs them.

A command is a module of this folder with `add_arguments(parser)` and `run(args)`; `DESCRIPTION` and `EPILOG` are
optional. It is imported only when it runs: `--help` answers at once, and `predict` never loads torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

from distilldsm.core.shell import run_shell
from distilldsm.core.version import __version__

if TYPE_CHECKING:
    from distilldsm.core.stage import Stage

COMMANDS: Mapping[str, str] = {
    "cross-validate": "train and evaluate every fold, and write one table of all folds",
    "predict": "segment scans; each mask is on its scan's own grid",
    "models": "list the trained models, and fetch one",
    "view": "show a scan and masks as a page for the browser",
    "drift": "check whether scans look like a model's training data",
    "summary": "show scores per label of the evaluated folds and of the cross-validation",
    "compare": "show several trainings side by side, case by case",
    "publish": "send to MLflow the outputs that it does not hold yet",
    "plots": "show DVC's plots (show, diff) as a page that works offline",
    "info": "show facts about an exported model, the networks or the installation",
    "plan": "show the decisions that are made from a data set, and why",
    "budget": "measure this machine, and turn a time into train.budget",
    "params": "show every parameter: type, default, meaning",
    "compose": "write params.yaml from the presets in conf/",
    "pipeline": "run the pipeline on Kubeflow: compile, run, submit, status",
    "lineage": "show what belongs to a DVC, MLflow or Kubeflow id",
    "doctor": "check this machine, MLflow, DVC's remote and Kubeflow",
}
"""Maps each command to its line in `--help`. The module has the command's name, with `_` for `-`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (data, environment) or 2 (usage, parameters)."""
    return run_shell(partial(_run, list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: Sequence[str]) -> int | None:
    name = arguments[0] if arguments else ""
    stage = None if name in COMMANDS else stages().get(name)
    if name not in COMMANDS and stage is None:
        overview = _overview()
        overview.parse_args(arguments)  # exits for --help, --version and unknown commands
        overview.error("the command comes first")
    if stage is not None:
        from distilldsm.components.command import main as run_stage

        return run_stage(stage, arguments[1:])
    code: int | None = _module(name).run(parser(name).parse_args(arguments[1:]))
    return code


def stages() -> Mapping[str, Stage]:
    """The stages by name. They are loaded only if the name is not a command, so that no command waits for them."""
    from distilldsm.components.registry import STAGES

    return {stage.name: stage for stage in STAGES}


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command or stage. The command's module is imported."""
    if name not in COMMANDS:
        from distilldsm.components.command import parser as of_stage

        return of_stage(stages()[name])
    module = _module(name)
    new = argparse.ArgumentParser(
        prog=f"distilldsm {name}",
        description=getattr(module, "DESCRIPTION", COMMANDS[name]),
        epilog=getattr(module, "EPILOG", None),
    )
    module.add_arguments(new)
    return new


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"distilldsm.cli.{name.replace('-', '_')}")


def _overview() -> argparse.ArgumentParser:
    table = {**{name: f"stage: {stage.help}" for name, stage in stages().items()}, **COMMANDS}
    width = max(map(len, table)) + 2
    new = argparse.ArgumentParser(
        prog="distilldsm",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Volumetric segmentation with Distill DSM. Not a medical device.\n\ncommands:\n"
        + "\n".join(f"  {name:{width}}{text}" for name, text in table.items()),
        epilog="exit codes: 0 done, 1 data or environment, 2 usage or parameters",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.add_argument("--version", action="version", version=f"distilldsm {__version__}")
    new.add_argument("command", metavar="COMMAND", choices=list(table), help="see distilldsm COMMAND --help")
    return new
