"""Runs inside a Kubeflow step: turns the step's parameters and artifacts into a call of the stage.

The pipeline has three more steps: `check`, `gate` and `finish`. Nothing here imports kfp. Artifacts are objects with
`path` and `metadata`, and the same code runs in a subprocess, in a container, on a cluster and in a test.
"""

from __future__ import annotations

import csv
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from distilldsm.components.command import perform
from distilldsm.components.registry import STAGES, find
from distilldsm.config import ExportConfig, Params, TrackingConfig
from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.files import read_json, sha256_json, write_json
from distilldsm.core.hashes import MANIFEST, content_hash
from distilldsm.core.mapping import flatten, from_mapping, to_mapping
from distilldsm.core.stage import WORK_VARIABLE, Input, Output, Stage
from distilldsm.core.version import __version__
from distilldsm.pipeline.delivery import deliver, on_cluster, tracked
from distilldsm.pipeline.packing import pack, unpacked
from distilldsm.tracking import run_id_of

VERSION_VARIABLE = "DISTILLDSM_PIPELINE_VERSION"
"""Environment variable: the version of distilldsm that compiled the pipeline."""

REFUSAL = "refusal.json"
"""File in an output: the stage refused its input, and why."""

T = TypeVar("T")


class Artifact(Protocol):
    """The part of a KFP artifact that is used here."""

    path: str
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The origin of a step's input."""

    stage: Stage
    """The stage that writes it."""
    below: str
    """Subfolder of that stage's output that is read; empty: all of it."""
    collected: bool
    """Whether the input consists of the outputs of all folds."""


def source_of(one: Input, stages: Sequence[Stage] = STAGES) -> Source:
    """The stage that writes an input, found by default paths. Raises ValueError if there is none."""
    for stage in stages:
        made = stage.output.path
        if one.per_fold and made == f"{one.path}/fold{{fold}}":
            return Source(stage=stage, below="", collected=True)
        if f"{one.path}/".startswith(f"{made}/"):
            return Source(stage=stage, below=one.path[len(made) + 1 :], collected=False)
    raise ValueError(f"no stage writes {one.path}")


def through_gate(stage: Stage, source: Source) -> bool:
    """Whether a stage gets an input from the gate's artifact, and not from the step that wrote it."""
    return stage.scope == "model" and source.stage.scope == "fold"


def run(name: str, **values: Any) -> bool | None:
    """Run a step with the parameters and artifacts of its component. Only `gate` returns a value (see there)."""
    if name == "finish":  # it reports the end of the run for any version
        from distilldsm.pipeline.finish import finish

        finish(**values)
        return None
    with component(name):
        if name == "check":
            check(**values)
        elif name == "gate":
            return gate(**values)
        else:
            run_stage(find(name), values)
    return None


@contextmanager
def component(name: str) -> Iterator[None]:
    """Wrap a component's body: image and pipeline must have the same version, and user errors show no traceback."""
    try:
        compiled = os.environ.get(VERSION_VARIABLE)
        if compiled and compiled != __version__:
            raise ConfigError(
                "the image and the pipeline have different versions of distilldsm",
                where=name,
                seen=f"distilldsm {__version__} in the image, {compiled} in the pipeline",
                rule="the same version",
                hint="build the images of this version, or compile the pipeline again",
            )
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def whole_numbers(value: Any) -> Any:
    """Turn whole numbers back into int: KFP passes every number inside a mapping or list as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [whole_numbers(inner) for inner in value]
    return value


def section(cls: type[T], values: Mapping[str, Any], name: str) -> T:
    """A section of `params.yaml` as a component received it.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value.
    """
    return from_mapping(cls, whole_numbers(values), where=name)


def sections_of(params: Params) -> dict[str, Any]:
    """The pipeline's arguments for these parameters: `folds`, `budget`, then one mapping per section.

    `budget` is `train.budget`: preprocessing needs it, but not the rest of that section.
    """
    values = to_mapping(params)
    return {"folds": values.pop("cv")["folds"], "budget": values["train"]["budget"], **values}


def check_parameters(folds: Sequence[float], sections: Mapping[str, Mapping[str, Any]]) -> Params:
    """Check all parameters together.

    Raises:
        ConfigError: as for `params.yaml`, including the checks across sections.
    """
    return section(Params, {"cv": {"folds": list(folds)}, **sections}, "pipeline parameters")


def check(folds: Sequence[float], budget: float | None = None, **sections: Mapping[str, Any]) -> None:
    """Step `check`: report wrong parameters at once, not after hours of computing."""
    params = check_parameters(folds, sections)
    if budget not in (None, params.train.budget):
        raise ConfigError(
            "the pipeline's 'budget' and 'train.budget' differ",
            where="pipeline parameters",
            seen=f"{budget:g} and {params.train.budget:g}",
            rule="the same number",
        )
    print(f"distilldsm {__version__}: {params.train.model.name} on {params.download.source}, folds {params.cv.folds}")


def run_stage(stage: Stage, values: Mapping[str, Any]) -> None:
    """Run a stage and fill its artifacts: output, metadata, HTML pages and metrics.

    A stage that refuses its input writes what it found to `<output>-failed`. KFP stores no output of a failed step, so
    this step succeeds and hands its findings on, and the next stage refuses with them.

    Raises:
        UserError: the stage failed, or an input was refused by the stage that made it.
    """
    received = {"folds": values["folds"]} if stage.section == "cv" else values["config"]
    config: Any = section(type(getattr(Params(), stage.section)), received, stage.section)
    fold = int(values["fold"]) if stage.per_fold else None
    artifact = values[stage.output.name]
    tracking = section(TrackingConfig, values["tracking"], "tracking") if "tracking" in values else None
    with tempfile.TemporaryDirectory() as folder:
        inputs = {one.name: _place(stage, one, values, fold, Path(folder)) for one in stage.inputs}
        for path in inputs.values():
            _raise_refusal(path)
        # A hash of data and parameters names the work folder: several trainings may share the volume.
        work = sha256_json([{name: content_hash(path) for name, path in inputs.items()}, received])[:12]
        key = f"{stage.name}-fold{fold}-{work}" if stage.distributed else None
        try:
            with resumable_output(artifact, key) as target:
                also = {name: values[name] for name in stage.also_by_name}
                run = _runner(stage, values)
                perform(stage, config, inputs, target, fold=fold, tracking=tracking, run=run, also=also)
        except UserError as error:
            failed = Path(artifact.path).with_name(f"{Path(artifact.path).name}-failed")
            if not failed.is_dir():
                raise
            _hand_on(error, stage, failed, Path(artifact.path), inputs)
        output = Path(artifact.path)
        if stage.scope != "data":
            artifacts = [one for value in values.values() for one in (value if isinstance(value, list) else [value])]
            places = [*inputs.values(), output]
            deliver(tracking, tracked(places, [one for one in artifacts if hasattr(one, "path")]))
        facts = dict(stage.facts(inputs, output)) if stage.facts else {}
        if stage.per_fold:
            facts["mlflow_run_id"] = run_id_of(inputs.get("model", output))
    facts |= {"data_version": values["data_version"]} if "data_version" in values else {}
    artifact.metadata.update(without_null(facts), content_hash=content_hash(output))
    _show(stage, output, values)
    if stage.scope == "data" and on_cluster():
        pack(output)


def _hand_on(error: UserError, stage: Stage, failed: Path, output: Path, inputs: Mapping[str, Path]) -> None:
    """Make the findings of a stage that refused its input its output. Paths in this pod mean nothing to the reader."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    page = f"the page 'report' of the step {stage.name}"
    texts = {key: str(getattr(error, key) or "") for key in ("problem", "where", "seen", "rule", "hint")}
    for place, short in {
        str(failed / "report.html"): page,
        **{str(path): name for name, path in inputs.items()},
    }.items():
        texts = {key: text.replace(place, short) for key, text in texts.items()}
    if output.is_dir():
        shutil.rmtree(output)
    failed.rename(output)
    write_json(output / REFUSAL, texts)


def _raise_refusal(path: Path) -> None:
    if (path / REFUSAL).is_file():
        texts = read_json(path / REFUSAL)
        raise DataError(texts.pop("problem"), **{key: text or None for key, text in texts.items()})


def without_null(value: Any) -> Any:
    """The value without mappings' entries that are None: KFP can pass None neither in parameters nor in metadata."""
    if isinstance(value, Mapping):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    return [without_null(inner) for inner in value] if isinstance(value, list | tuple) else value


def _place(stage: Stage, one: Input, values: Mapping[str, Any], fold: int | None, folder: Path) -> Path:
    """The path of an input in this pod. Packed files are unpacked in `folder`; all folds' outputs are linked there."""
    source = source_of(one)
    if through_gate(stage, source):
        return Path(values["collected"].path) / one.path.format(fold=fold)
    if not source.collected:
        return unpacked(Path(values[one.name].path), source.below, folder / one.name)
    together = folder / one.name
    together.mkdir()
    for artifact in values[one.name]:
        (together / f"fold{fold_of(artifact)}").symlink_to(Path(artifact.path).absolute())
    return together


def fold_of(artifact: Artifact) -> int:
    """The fold that made an artifact, from its manifest."""
    return int(read_json(Path(artifact.path) / MANIFEST)["fold"])


def _runner(stage: Stage, values: Mapping[str, Any]) -> Any:
    """The function that runs a distributed stage: on all GPUs of this pod, or as a TrainJob. None: the stage's own."""
    if not stage.distributed:
        return None
    from distilldsm.pipeline.trainjob import run_train
    from distilldsm.pipeline.trainjob_manifest import TrainJobConfig

    job = section(TrainJobConfig, values["trainjob"], "trainjob") if values["trainjob"] else None
    return partial(run_train, job=job)


@contextmanager
def resumable_output(artifact: Artifact, key: str | None) -> Iterator[Path]:
    """Where a stage writes: the artifact, or a folder `key` below WORK_VARIABLE that is copied to it when complete."""
    root = os.environ.get(WORK_VARIABLE)
    if not (root and key):
        yield Path(artifact.path)
        return
    target = Path(root) / key
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        user = os.getuid() if hasattr(os, "getuid") else "?"
        raise UserError(
            "the work volume is not writable",
            where=root,
            seen=f"{error.strerror} for user {user}",
            rule=f"writable for user {user} or its group",
            hint="make it once: chgrp -R 10001 and chmod -R g+rwX on the volume, or set fsGroup (docs/kubeflow.md)",
        ) from None
    yield target
    shutil.copytree(target, artifact.path, dirs_exist_ok=True)
    shutil.rmtree(target)


def _show(stage: Stage, output: Path, values: Mapping[str, Any]) -> None:
    """Fill the artifacts that Kubeflow displays from files of the output."""
    for file, shown in stage.shown().items():
        path = output / file
        if shown.kind in ("HTML", "Markdown"):
            if path.is_file():
                shutil.copyfile(path, values[shown.name].path)
        elif shown.kind == "Metrics":
            _log_metrics(values[shown.name], path, shown)
        elif shown.kind == "ClassificationMetrics":
            values[shown.name].log_confusion_matrix(*confusion_matrix(path))


def _log_metrics(metrics: Any, path: Path, shown: Output) -> None:
    """Copy the numbers of a JSON file to a KFP Metrics artifact; other values are left out."""
    for key, value in flatten(read_json(path), separator="_").items():
        if isinstance(value, int | float) and not isinstance(value, bool) and (not shown.keys or key in shown.keys):
            metrics.log_metric(key, float(value))


def confusion_matrix(path: Path) -> tuple[list[str], list[list[int]]]:
    """Labels and counts by true (rows) and predicted label, from the evaluation's file of the confusion matrix."""
    with path.open(newline="", encoding="utf-8") as stream:
        counts = Counter((row["actual"], row["predicted"]) for row in csv.DictReader(stream))
    names = sorted({name for pair in counts for name in pair}, key=lambda name: (name != "background", name))
    return names, [[counts[actual, predicted] for predicted in names] for actual in names]


def gate(
    config: Mapping[str, Any],
    cross_validation: Artifact,
    collected: Artifact,
    summary: Artifact,
    **folds: Sequence[Artifact],
) -> bool:
    """Step `gate`: allow the export of the models if the mean Dice over labels and folds reaches `export.min_dice`.

    It also copies the files that the exports need from all folds to the artifact `collected`, with the paths of
    dvc.yaml: kfp cannot pass the folds' own artifacts into the loop of the exports.

    Args:
        config: the section `export`.
        folds: by output name, the artifacts of all folds.

    Returns:
        Whether the models may be exported. (The only output value: kfp's local runner confuses several in a condition.)
    """
    from distilldsm.evaluation.metrics import METRICS

    threshold = section(ExportConfig, config, "export").min_dice
    for output, files in outputs_for_models():
        for artifact in folds[output.name]:
            _copy(Path(artifact.path), Path(collected.path) / output.path.format(fold=fold_of(artifact)), files)
    table = read_json(Path(cross_validation.path) / "summary.json")
    dice = table["mean"]["dice"]["mean_folds"] or 0.0
    passed: bool = dice >= threshold
    verdict = "passed" if passed else "not passed: nothing is exported or registered"
    lines = ["| label | Dice | sd over folds | sd over cases | folds |", "|---|---|---|---|---|"]
    for label, of_label in table["labels"].items():
        score = of_label["dice"]
        cells = (METRICS["dice"].text(score[key]) for key in ("mean_folds", "sd_folds", "sd_cases"))
        lines.append(f"| {label} | {' | '.join(cells)} | {score['folds']} |")
    listed = ", ".join(str(fold) for fold in table["folds"])
    lines += ["", f"Folds {listed}. Mean Dice {dice:.4f}, threshold {threshold:g}: **{verdict}**."]
    Path(summary.path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    collected.metadata.update(dice=dice, folds=table["folds"])
    print("\n".join(lines))
    return passed


def outputs_for_models(stages: Sequence[Stage] = STAGES) -> list[tuple[Output, tuple[str, ...]]]:
    """The outputs of folds that the stages after the gate read, each with its files; no files: the whole folder."""
    files_of: dict[str, tuple[Output, list[tuple[str, ...]]]] = {}
    for stage in (one for one in stages if one.scope == "model"):
        for one in stage.inputs:
            source = source_of(one, stages)
            if through_gate(stage, source):
                output = source.stage.output
                files_of.setdefault(output.name, (output, []))[1].append(tuple(one.files.values()))
    return [(output, () if () in read else tuple(sorted(set().union(*read)))) for output, read in files_of.values()]


def _copy(source: Path, target: Path, files: Sequence[str]) -> None:
    if not files:
        shutil.copytree(source, target)
        return
    target.mkdir(parents=True)
    for file in files:
        if (source / file).is_file():  # the stage that reads it reports missing files
            shutil.copyfile(source / file, target / file)
