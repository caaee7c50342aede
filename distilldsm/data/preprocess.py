"""Preprocess a data set: fingerprint, plan, arrays for training, splits. Parallel and resumable per case."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.config import PreprocessConfig
from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.files import read_json, whole_file, write_json
from distilldsm.core.hashes import finish, is_finished
from distilldsm.core.mapping import from_mapping
from distilldsm.core.progress import progress
from distilldsm.core.workers import worker_count, worker_pool
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.data.fingerprint import CaseFingerprint, fingerprint_case, load_case, summarise
from distilldsm.data.geometry import label_to_network_space, to_network_space
from distilldsm.data.plan import Plan, TrainingPlan, make_plan, regions_of, resampled_shape
from distilldsm.data.splits import make_splits, read_splits
from distilldsm.data.targets import SHARES_LIMIT
from distilldsm.io.formats import read_file

LOCATIONS_PER_CLASS = 2_000
"""Largest number of foreground voxels stored per case and class, for oversampling."""
LARGEST_STORED = 65_000
_BYTES_PER_VOXEL = 40
"""Peak memory, per voxel, of reading, normalising and resampling one channel (float64 temporaries), bytes."""


def preprocess_dataset(
    root: Path,
    index: DatasetIndex,
    config: PreprocessConfig,
    output: Path,
    *,
    budget: float = TrainingPlan.budget,
    left_out: Collection[str] = (),
) -> Plan:
    """Write everything training needs into `output`.

    Layout: `plan.json`, `fingerprint.json`, `splits.json`, `dataset_index.json`, and per case
    `images/<id>.npy` (C, D, H, W) float16, `labels/<id>.npy` (D, H, W) uint8 class indices, `shares/<id>.npy`
    (K - 1, D, H, W) uint8 if cases are resampled and there are at most SHARES_LIMIT classes (`label_to_network_space`),
    `locations/<id>.npy` (n, 4) int32 rows (class, d, h, w), `cases/<id>.json` (the geometry record). A case that
    an interrupted call has finished is not done again.

    Args:
        budget: `train.budget`, voxels.
        left_out: cases that validation excluded from `index`; the file `config.splits` may still name them.

    Raises:
        DataError: cases cannot be read (the error counts all of them), or the folds in `config.splits` are impossible.
        ConfigError: there are too few patients for the folds.
    """
    if config.splits:
        origin: dict[str, Any] = {"source": Path(config.splits).name}
        folds = read_splits(config.splits, index, left_out=left_out)
    else:
        origin = {"seed": config.split_seed}
        folds = make_splits(index, count=config.folds, seed=config.split_seed)
    for name in ("images", "labels", "locations", "cases", ".fingerprint"):
        (output / name).mkdir(parents=True, exist_ok=True)
    # A task needs only the head of the index. With all cases in it, the data sent would grow with their square.
    about = replace(index, cases=index.cases[:1])

    todo = [c for c in index.cases if not is_finished(output, f"fingerprint/{c.id}")]
    workers = _workers(index, config, _largest_scan(root, index))
    run_cases("fingerprint", _fingerprint, [(root, c, about, output) for c in todo], workers)
    fingerprints = [
        from_mapping(CaseFingerprint, read_json(output / ".fingerprint" / f"{c.id}.json"), where=c.id)
        for c in index.cases
    ]
    if config.plan:
        plan = Plan.load(config.plan)
    else:
        training_cases = int(np.median([len(fold["train"]) for fold in folds]))
        plan = make_plan(index, fingerprints, config, budget=budget, training_cases=training_cases)
    _check_plan(plan, index, config)

    # Arrays in a resumed directory belong to the same plan, because the directory's key holds data and config.
    todo = [c for c in index.cases if not is_finished(output, f"cases/{c.id}")]
    order = plan.axis_order
    spacing = [plan.target_spacing_mm[order.index(k)] for k in range(3)]
    after = [resampled_shape(f.shape, f.spacing_mm, spacing) for f in fingerprints]
    workers = _workers(
        index, config, max(math.prod(n) for f, m in zip(fingerprints, after, strict=True) for n in (f.shape, m))
    )
    with_shares = len(plan.class_names) <= SHARES_LIMIT and any(
        f.shape != n for f, n in zip(fingerprints, after, strict=True)
    )
    if with_shares:
        (output / "shares").mkdir(exist_ok=True)
    run_cases("preprocess", _preprocess, [(root, c, about, plan, with_shares, output) for c in todo], workers)

    plan.save(output / "plan.json")
    write_json(output / "fingerprint.json", summarise(fingerprints, index))
    write_json(output / "splits.json", {"schema_version": 1, **origin, "folds": folds})
    index.save(output)
    shutil.rmtree(output / ".fingerprint")
    return plan


def run_cases(title: str, function: Callable[..., None], tasks: Sequence[tuple], workers: int) -> None:
    """Call `function` once per task in worker processes. Collect the errors and raise them as one DataError.

    The second item of each task is its `Case`.
    """
    problems: list[tuple[str, UserError]] = []
    for case, error in progress(_run(function, tasks, workers), total=len(tasks), title=title, unit="case"):
        if error is not None:
            problems.append((case.id, error))
    if problems:
        problems.sort(key=lambda item: item[0])
        shown = "\n".join(f"- case {case}: {error}" for case, error in problems[:10])
        more = f"\n(and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise DataError(f"{len(problems)} case(s) failed in {title}:\n{shown}{more}")


def _run(
    function: Callable[..., None], tasks: Sequence[tuple], workers: int
) -> Iterator[tuple[Case, UserError | None]]:
    if workers == 1 or len(tasks) <= 2:
        for task in tasks:
            yield task[1], _guard(function, task)
        return
    with worker_pool(workers, setting="preprocess.workers") as pool:
        futures = {pool.submit(_guard, function, task): task[1] for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _guard(function: Callable[..., None], task: tuple) -> UserError | None:
    try:
        function(*task)
    except UserError as error:
        return DataError(str(error))  # only a plain message can be sent back from the worker
    return None


def _fingerprint(root: Path, case: Case, index: DatasetIndex, output: Path) -> None:
    path = output / ".fingerprint" / f"{case.id}.json"
    write_json(path, fingerprint_case(root, case, index))
    finish(output, f"fingerprint/{case.id}", path)


def _preprocess(root: Path, case: Case, index: DatasetIndex, plan: Plan, with_shares: bool, output: Path) -> None:
    scan, classes = load_case(root, case, index)
    image, record = to_network_space(scan, plan)
    count = len(plan.class_names)
    shares = np.zeros((count - 1, *record.resampled), np.uint8) if with_shares else None
    label = label_to_network_space(classes, record, count, shares=shares)
    largest = max(float(image.max(initial=0)), -float(image.min(initial=0)))
    if not largest <= LARGEST_STORED:
        raise DataError(
            "has intensities that are too large to store for training",
            where=root / case.images[0],
            seen=f"{largest:.4g} after normalisation",
            rule=f"at most {LARGEST_STORED} (half precision)",
            hint="set preprocess.normalisation to zscore, or scale the images",
        )
    arrays: dict[str, npt.NDArray] = {
        "images": image.astype(np.float16),
        "labels": label,
        "locations": foreground_locations(label, len(plan.class_names)),
    }
    if shares is not None:
        arrays["shares"] = shares
    files = {output / name / f"{case.id}.npy": array for name, array in arrays.items()}
    for path, array in files.items():
        save_array(path, array)
    described = output / "cases" / f"{case.id}.json"
    write_json(described, {"patient": case.patient, "geometry": record})
    finish(output, f"cases/{case.id}", *files, described)


def foreground_locations(label: npt.NDArray[np.uint8], class_count: int) -> npt.NDArray[np.int32]:
    """Up to LOCATIONS_PER_CLASS evenly spread voxels of every foreground class: (n, 4) rows (class, d, h, w)."""
    rows = []
    for k in range(1, class_count):
        found = np.argwhere(label == k)
        if len(found) > LOCATIONS_PER_CLASS:
            found = found[np.linspace(0, len(found) - 1, LOCATIONS_PER_CLASS).astype(np.int64)]
        rows.append(np.column_stack([np.full(len(found), k), found]))
    return np.concatenate(rows).astype(np.int32) if rows else np.zeros((0, 4), dtype=np.int32)


def save_array(path: Path, array: npt.NDArray) -> None:
    """Write a .npy file completely or not at all."""
    with whole_file(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, array, allow_pickle=False)


def _largest_scan(root: Path, index: DatasetIndex) -> int:
    """Number of voxels of the largest scan, from the headers of about fifty scans."""
    largest = 0
    for case in index.cases[:: max(1, len(index.cases) // 50)]:
        with contextlib.suppress(DataError):  # a damaged case is reported later, with all others
            largest = max(largest, math.prod(read_file(root / case.images[0]).shape))
    return largest


def _workers(index: DatasetIndex, config: PreprocessConfig, largest: int) -> int:
    """Number of workers, limited by the cores and by the memory budget for cases of `largest` voxels."""
    per_worker = largest * _BYTES_PER_VOXEL * (len(index.channels) + 1) + 150_000_000
    return max(1, min(worker_count(config.workers, len(index.cases)), int(config.memory_gb * 1e9 // per_worker)))


def _check_plan(plan: Plan, index: DatasetIndex, config: PreprocessConfig) -> None:
    def summary(channels: Sequence[Channel], names: Sequence[str], values: Sequence[int]) -> str:
        labels = ", ".join(f"{value} {name}" for value, name in zip(values, names, strict=True))
        return f"channels {', '.join(f'{c.name} ({c.modality})' for c in channels)}; labels {labels}"

    seen = summary(plan.channels, plan.class_names, plan.class_values)
    rule = summary(index.channels, index.class_names, index.class_values)
    if seen != rule:
        raise ConfigError(
            "the plan is for another data set",
            where=config.plan,
            seen=seen,
            rule=rule,
            hint="make a new plan (preprocess.plan: null), or correct the names in a copy of the plan",
        )
    if config.regions is not None and plan.regions != regions_of(index, config):
        raise ConfigError(
            "the plan's regions differ from preprocess.regions",
            where=config.plan,
            seen=[region.name for region in plan.regions],
            hint="set preprocess.regions to null, or correct a copy of the plan",
        )
