"""The command `cross-validate`: the stages of dvc.yaml except the export, without DVC.

It prepares the data, trains and evaluates every fold, and writes the table over all folds. An output that was made from
the same parameters and inputs is kept; an interrupted training continues.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from distilldsm.components.registry import STAGES
from distilldsm.config import Params, load_params
from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.files import read_json
from distilldsm.core.interruption import RESUME_VARIABLE, command_again, explains_interrupt
from distilldsm.core.machine import usable_cores
from distilldsm.core.progress import Meter, beside_the_bar, meter
from distilldsm.core.shell import end_processes
from distilldsm.core.stage import Stage

SPLITS = Path("data/preprocessed/splits.json")
LOGS = Path("logs/cross_validation")
STOP_S = 30.0


class Folds:
    """Runs the stages in subprocesses, for several folds at once. A stage that fails stops the others.

    Args:
        arguments: `--params` and `--set`, passed to every stage.
        jobs: number of folds at once, 1 or more; they share the cores.
        output: folder for `models/`, `evaluation/` and `logs/`.
        ensemble: folders with a `models/` each. Nothing is trained; their networks are averaged fold by fold.
        stages: all stages, in their order.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        jobs: int,
        output: Path = Path(),
        ensemble: Sequence[Path] = (),
        stages: Sequence[Stage] = STAGES,
    ) -> None:
        self.arguments, self.jobs = list(arguments), jobs
        self.output, self.ensemble, self.stages = output, tuple(ensemble), tuple(stages)
        self._running: dict[int | None, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._error: Exception | None = None

    def prepare(self) -> None:
        """Download, validate and preprocess, unless the outputs are up to date.

        Raises:
            UserError: a stage failed; names its log.
        """
        with ThreadPoolExecutor(1) as pool:
            task = pool.submit(self._run_stages, None)
            self._wait([task])
            task.result()

    def of_scope(self, fold: int | None) -> list[Stage]:
        """The data stages (fold None), or the stages of a fold. An ensemble has no training stage."""
        if fold is None:
            return [stage for stage in self.stages if stage.scope == "data"]
        stages = [stage for stage in self.stages if stage.scope == "fold"]
        return [stage for stage in stages if not (self.ensemble and stage.output.kind == "Model")]

    def _run_stages(self, fold: int | None) -> None:
        for stage in self.of_scope(fold):
            if self._stopped:
                return
            self._stage(fold, stage)

    def run(self, folds: Sequence[int]) -> None:
        """Train and evaluate the folds.

        Raises:
            UserError: a stage failed; names its log.
        """
        self.jobs = min(self.jobs, len(folds))
        with (
            explains_interrupt(lambda: f"cross-validate: {shown.done} of {len(folds)} folds are done"),
            meter(total=len(folds), title="cross-validate", unit="fold") as shown,
            ThreadPoolExecutor(self.jobs) as pool,
        ):
            tasks = [pool.submit(self._fold, fold, shown) for fold in folds]
            self._wait(tasks)
            if self._error is not None:
                raise self._error

    def _wait(self, tasks: Sequence[Future[None]]) -> None:
        try:
            wait(tasks)
        except KeyboardInterrupt:
            # Ctrl-C has reached the stages too. A second signal would disturb their shutdown.
            self._stop(patience_s=5.0)
            raise

    def _fold(self, fold: int, shown: Meter) -> None:
        try:
            self._run_stages(fold)
            if not self._stopped:
                with _PRINTING:
                    shown.advance()
        except Exception as error:
            with self._lock:
                if not self._stopped:  # stages that fail later were stopped by us
                    self._error = error
            self._stop()

    def _stage(self, fold: int | None, stage: Stage) -> None:
        log = self.output / LOGS / (f"{stage.name}.log" if fold is None else f"fold{fold}-{stage.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(
                    self.command(stage, fold),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env=self._environment(alone=fold is None),
                )
                self._running[fold] = process
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                say(fold, line.rstrip())
            code = process.wait()
        with self._lock:
            del self._running[fold]
            if code == 0 or self._stopped:
                return
        raise _failed(fold, stage.name, log, code)

    def command(self, stage: Stage, fold: int | None) -> list[str]:
        """A stage's command line. The outputs of the fold's other stages are below `output`."""
        words = [sys.executable, "-m", stage.run.__module__, *self.arguments]
        if fold is None:
            return words
        words += ["--fold", str(fold)]
        made = {one.output.path: one.output for one in self.of_scope(fold)}
        for one in stage.inputs:
            place = one.path.format(fold=fold)
            if self.ensemble and "{fold}" in one.path and one.path not in made:
                first, *others = (str(folder / place) for folder in self.ensemble)
                words += [f"--{one.name}", first, *(word for other in others for word in ("--ensemble", other))]
            elif one.path in made:
                words += [f"--{one.name}", str(self.output / place)]
        return [*words, "--output", str(self.output / stage.output.path.format(fold=fold))]

    def _environment(self, alone: bool) -> dict[str, str]:
        inherited = {**os.environ, RESUME_VARIABLE: command_again()}
        if alone or self.jobs == 1:
            return inherited
        return {**inherited, "OMP_NUM_THREADS": str(max(1, usable_cores() // self.jobs))}

    def _stop(self, patience_s: float = 0.0) -> None:
        """Start no more stages, and end those that still run after `patience_s` seconds."""
        with self._lock:
            self._stopped = True
            running = list(self._running.values())
        end_processes(running, grace_s=STOP_S, patience_s=patience_s)


def _failed(fold: int | None, stage: str, log: Path, code: int) -> UserError:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    error = UserError(
        f"{stage if fold is None else f'fold {fold}: {stage}'} failed, exit code {code}",
        where=log,
        seen=(errors or lines or ["nothing"])[-1],
        hint="fix the error and run the same command again: finished outputs stay, and a training continues",
    )
    error.exit_code = code if code in (1, 2) else 1
    return error


_PRINTING = threading.Lock()


def say(fold: int | None, text: str) -> None:
    """Print a whole line, for a fold or (None) for a stage that all folds share."""
    with _PRINTING, beside_the_bar():
        print(text if fold is None else f"fold {fold} | {text}", flush=True)


def run(
    params_file: str,
    assignments: Sequence[str],
    folds: Sequence[int] | None,
    jobs: int,
    output: Path = Path(),
    ensemble: Sequence[Path] = (),
) -> None:
    """Run the command.

    Args:
        params_file, assignments: the parameter file, and changes to it (`--set`).
        folds: their numbers; None: all folds.
        jobs: number of folds at once.
        output: folder for `models/`, `evaluation/`, `cross_validation/` and `logs/`.
        ensemble: output folders of earlier calls. Their networks are averaged fold by fold; nothing is trained.

    Raises:
        UserError: `jobs` below 1, a fold that does not exist, an ensemble of one folder, an output that is one of the
            ensemble's folders, or a stage that failed.
    """
    _check_ensemble(ensemble, output)
    if jobs < 1:
        raise ConfigError("is too small", where="--jobs", seen=jobs, rule="1 or more")
    load_params(params_file, assignments)  # report wrong parameters once, before anything starts
    arguments = ["--params", params_file, *(word for one in assignments for word in ("--set", one))]
    stages = Folds(arguments, jobs, output, ensemble)
    stages.prepare()
    count = len(read_json(SPLITS)["folds"])
    numbers = list(range(count)) if folds is None else sorted(set(folds))
    beyond = [fold for fold in numbers if not 0 <= fold < count]
    if beyond:
        raise DataError("there is no such fold", where="--folds", seen=beyond[0], rule=f"0 to {count - 1}")
    stages.run(numbers)
    params = load_params(params_file, [*assignments, f"cv.folds={json.dumps(numbers)}"])
    _over_folds(params, output, ensemble)


def _over_folds(params: Params, output: Path, ensemble: Sequence[Path]) -> None:
    """Run the stages over all folds in this process: they take seconds, and print the result."""
    for stage in (one for one in STAGES if one.scope == "folds"):
        inputs = {}
        for one in stage.inputs:
            trained = bool(ensemble) and one.path == "models"
            root = ensemble[0] if trained else output if one.per_fold else Path()
            inputs[one.name] = root / one.path
        config = getattr(params, stage.section)
        stage.run(config, inputs, {stage.output.name: output / stage.output.path}, tracking=params.tracking)


def _check_ensemble(ensemble: Sequence[Path], output: Path) -> None:
    if len(ensemble) == 1:
        raise ConfigError("names one folder", where="--ensemble", seen=ensemble[0], rule="two or more are averaged")
    for folder in ensemble:
        if not (folder / "models").is_dir():
            raise DataError(
                "holds no models", where=folder, seen=f"no {folder / 'models'}", rule="an output of cross-validate"
            )
    if ensemble and output.resolve() in {Path().resolve(), *(folder.resolve() for folder in ensemble)}:
        raise ConfigError(
            "holds the results of a training",
            where="--output",
            seen=output,
            rule="an ensemble needs its own folder",
            hint="e.g. --output runs/ensemble",
        )
