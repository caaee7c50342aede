"""The command line of a stage, built from its record."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from distilldsm.core.assignments import add_parameters
from distilldsm.core.errors import DataError
from distilldsm.core.output_directory import is_current
from distilldsm.core.progress import seconds_of
from distilldsm.core.shell import run_shell
from distilldsm.core.stage import Input, Stage


def parser(stage: Stage) -> argparse.ArgumentParser:
    """The argument parser of `distilldsm STAGE` and `python -m distilldsm.components.STAGE`."""
    result = argparse.ArgumentParser(prog=f"distilldsm {stage.name}", description=stage.help)
    add_parameters(result)
    if stage.per_fold:
        result.add_argument("--fold", type=int, default=0, help="default: %(default)s")
    if stage.distributed:
        text = 'go on with the finished training for a time, e.g. "30 min", from its last weights'
        result.add_argument("--continue-for", metavar="TIME", help=text)
    for one in stage.inputs:
        condition = ", if it exists" if one.optional else ""
        result.add_argument(f"--{one.name}", type=Path, metavar="PATH", help=f"default: {_shown(one.path)}{condition}")
    for option in stage.options:
        result.add_argument(
            f"--{option.name}", type=Path, action="append", default=[], metavar=option.metavar, help=option.help
        )
    result.add_argument("--output", type=Path, metavar="DIR", help=f"default: {_shown(stage.output.path)}")
    return result


def _shown(path: str) -> str:
    return path.replace("{fold}", "<FOLD>")


def main(stage: Stage, argv: Sequence[str] | None = None) -> int:
    """Run a stage from the command line. Prints user errors to stderr. Returns the exit code: 0 means success.

    If the output exists and its parameters, inputs and code have not changed, the stage does not run again.
    """
    args = parser(stage).parse_args(argv)

    def command() -> None:
        from distilldsm.config import load_params

        params = load_params(args.params, args.set)
        if stage.per_fold:
            from distilldsm.models.inserted import trust_builder

            trust_builder(params.train.model.options)
        fold = args.fold if stage.per_fold else None
        config = getattr(params, stage.section)
        inputs = {one.name: path for one in stage.inputs if (path := _place(one, getattr(args, one.name), fold))}
        output = args.output or Path(stage.output.path.format(fold=fold))
        if getattr(args, "continue_for", None):
            seconds = seconds_of(args.continue_for, where="--continue-for")
            _require_current(stage, config, inputs, output, fold)
            stage.run(
                config, inputs, {stage.output.name: output}, fold=fold, tracking=params.tracking, continue_for=seconds
            )
            return
        perform(
            stage,
            config,
            inputs,
            output,
            fold=fold,
            tracking=params.tracking,
            also={name: reduce(getattr, key.split("."), params) for name, key in stage.also_by_name.items()},
            **{option.name: getattr(args, option.name) for option in stage.options},
        )

    return run_shell(command)


def _place(one: Input, argument: Path | None, fold: int | None) -> Path | None:
    """The path of an input: the argument, else the default. None for an optional input that does not exist."""
    default = Path(one.path.format(fold=fold))
    return argument or (default if default.exists() or not one.optional else None)


def _require_current(stage: Stage, config: Any, inputs: Mapping[str, Path], output: Path, fold: int | None) -> None:
    """Raise DataError if the output was not made with these parameters, inputs and code."""
    if not is_current(output, **stage.key(config, inputs, fold)):
        raise DataError(
            "holds no finished training with these parameters, data and code",
            where=output,
            hint="train first, without --continue-for; or start a new training from it with train.initial_weights",
        )


def perform(
    stage: Stage,
    config: Any,
    inputs: Mapping[str, Path],
    output: Path,
    *,
    fold: int | None = None,
    tracking: Any = None,
    run: Callable[..., None] | None = None,
    also: Mapping[str, Any] | None = None,
    **options: Sequence[Path],
) -> None:
    """Run a stage, unless its output exists and its parameters, inputs and code have not changed.

    Args:
        config: the stage's section of the parameters.
        run: called instead of the stage's own `run`, with the same arguments.
        also: the values of the stage's parameters in other sections.

    Raises:
        UserError: any error of the stage.
    """
    is_up_to_date = is_current(output, **stage.key(config, inputs, fold, also=also, **options))
    if is_up_to_date and not (stage.outdated and stage.outdated(config, output)):
        print(f"{stage.name}: up to date")
        return
    keywords: dict[str, Any] = {**({"fold": fold} if stage.per_fold else {}), **(also or {})}
    if stage.scope != "data":
        keywords["tracking"] = tracking
    (run or stage.run)(config, inputs, {stage.output.name: output}, **keywords, **options)
