"""The command `distilldsm`: one sub-command a stage, plus those of `_parser` and `UPPER`.

Imports of this file are light, so that `--help` answers at once and `predict` never loads torch; what a command needs
is imported when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distilldsm import __version__
from distilldsm.cli.compose import add_compose
from distilldsm.cli.drift import add_drift
from distilldsm.cli.predict import add_predict
from distilldsm.cli.view import add_view
from distilldsm.core.shell import run_shell

STAGES = {
    "download": "fetch labelled volumes, or make the embedded sample",
    "validate": "check every case",
    "preprocess": "fingerprint, plan, arrays for training, splits",
    "train": "train one fold",
    "evaluate": "score one fold in the scans' own geometry",
    "export": "one fold to ONNX and OpenVINO, compared with the network",
}


UPPER = {
    "cross-validate": (
        "distilldsm.components.all_folds",
        "main",
        "train and evaluate every fold, and put them into one table",
    ),
    "doctor": (
        "distilldsm.cli.doctor",
        "main",
        "is this machine ready, and do MLflow, DVC's remote and Kubeflow answer?",
    ),
    "pipeline": ("distilldsm.cli.pipeline", "main", "the same pipeline on Kubeflow: compile, run, submit, status"),
    "plots": ("distilldsm.cli.plots", "main", "DVC's plots (show, diff) as a page that needs no network"),
    "lineage": ("distilldsm.cli.pipeline", "lineage_main", "from a DVC, MLflow or Kubeflow id to the others"),
}
"""Commands of several stages, and of the pipeline package: module, function, help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (data, environment) or 2 (usage, parameters)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in STAGES:
        return _run_above(f"distilldsm.components.{arguments[0]}", "main", arguments[1:])
    if arguments and arguments[0] in UPPER:
        module, function, _ = UPPER[arguments[0]]
        return _run_above(module, function, arguments[1:])
    args = _parser().parse_args(arguments)

    def command() -> None:
        from distilldsm.cli import commands
        from distilldsm.cli import compare as compare_command
        from distilldsm.cli import compose as compose_command
        from distilldsm.cli import drift as drift_command
        from distilldsm.cli import predict as predict_command
        from distilldsm.cli import view as view_command

        if args.command == "predict":
            predict_command.predict(args)
        elif args.command == "compare":
            compare_command.compare(args)
        elif args.command == "compose":
            compose_command.compose(args)
        elif args.command == "drift":
            drift_command.drift(args)
        elif args.command == "view":
            view_command.view(args)
        else:
            getattr(commands, args.command)(args)

    return run_shell(command)


def _run_above(module: str, function: str, arguments: list[str]) -> int:
    # The one place where the library looks upwards: stages and pipeline are not part of it, but users expect them under
    # the one command. Imported by name, when asked for.
    import importlib

    code = 0

    def command() -> None:
        nonlocal code
        code = getattr(importlib.import_module(module), function)(arguments)

    # They catch their own errors; what the shell adds here is the message for a missing package.
    return run_shell(command) or code


def subcommands() -> tuple[str, ...]:
    """The commands that are neither stages nor in `UPPER`."""
    (choices,) = (a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return tuple(name for name in choices if name not in STAGES and name not in UPPER)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distilldsm",
        description="Volumetric segmentation with Distill DSM. Not a medical device.",
        epilog="exit codes: 0 done, 1 data or environment, 2 usage or parameters",
    )
    parser.add_argument("--version", action="version", version=f"distilldsm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for stage, text in STAGES.items():
        commands.add_parser(stage, help=f"stage: {text}", add_help=False)
    for name, (_, _, text) in UPPER.items():
        commands.add_parser(name, help=text, add_help=False)

    add_predict(commands)
    add_drift(commands)
    add_view(commands)

    info = commands.add_parser("info", help="facts of an exported model, the networks, the installation")
    info.add_argument("model_dir", metavar="MODEL_DIR", nargs="?", help="checks its files too")
    info.add_argument("--models", action="store_true", help="list the networks and their options")
    info.add_argument("--json", action="store_true", help="print a JSON object")

    plan = commands.add_parser("plan", help="what was, or would be, decided from a data set, and why")
    plan.add_argument("directory", metavar="DIR", help="a preprocessed or model directory, or a downloaded data set")
    plan.add_argument("--params", default="params.yaml", help="for a data set without a plan (default: %(default)s)")
    plan.add_argument("--json", action="store_true", help="print a JSON object")

    params = commands.add_parser("params", help="every parameter: type, default, what it is")
    params.add_argument("keys", metavar="KEY", nargs="*", help="a parameter or a section, e.g. train.augment")
    params.add_argument("--markdown", action="store_true", help="as tables in Markdown")

    add_compose(commands)

    summary = commands.add_parser("summary", help="scores per label of the evaluated folds and of the cross-validation")
    summary.add_argument("directories", metavar="DIR", nargs="*", help="default: evaluation/fold*")
    summary.add_argument("--json", action="store_true", help="print a JSON object")

    compare = commands.add_parser(
        "compare",
        help="several trainings side by side, case by case",
        description="Means, standard deviations over cases and folds, and a paired Wilcoxon test against the first "
        "one, a pair for each patient, Holm-corrected, over the cases that all were scored on.",
    )
    compare.add_argument(
        "trainings",
        metavar="NAME=DIR[,DIR...]",
        nargs="+",
        help="a cross_validation, an evaluated fold, or a folder of them, e.g. distill=runs/distill/cross_validation",
    )
    compare.add_argument(
        "--postprocessed",
        action="store_true",
        help="scores after the post-processing that the other folds decide on (of cross-validations)",
    )
    compare.add_argument("-o", "--output", metavar="DIR", help="also write comparison.csv, costs.csv, comparison.png")
    compare.add_argument("--json", action="store_true", help="print a JSON object")
    return parser
