"""Measures how often `distilldsm drift` gives a false alarm on held-out cases, and which changes it detects.

    python -m benchmarks.drift --work DIR hippocampus=Task04_Hippocampus.tar acdc=Dataset127_ACDC.tar

For each data set, the reference is the fingerprint of fold 0's training cases. Its held-out cases should show no drift;
after each change below, and in the cases of the other data sets, drift should be found. No network is trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilldsm.components import download, validate
from distilldsm.config import DownloadConfig, PreprocessConfig, ValidateConfig
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.drift_measures import measures_of, values_of
from distilldsm.data.fingerprint import fingerprint_case, load_case
from distilldsm.data.plan import Plan, make_plan
from distilldsm.data.scan_measures import measure_scan
from distilldsm.data.splits import make_splits
from distilldsm.data.training_distribution import make_distribution
from distilldsm.drift.compare import Reference, check_scan, check_set, references
from distilldsm.io import Channel, Scan

FloatArray = npt.NDArray[np.float32]
Change = Callable[[FloatArray, npt.NDArray[np.float64]], tuple[FloatArray, npt.NDArray[np.float64]]]
PATIENTS = {"acdc": r"^(patient\d+)"}
"""Pattern of the patient in the case ids of data sets with several cases per patient."""
SETS = 200
SET_SIZE = 10


def _spacing(factor: float, axis: int) -> Change:
    def change(data: FloatArray, affine: npt.NDArray[np.float64]) -> tuple[FloatArray, npt.NDArray[np.float64]]:
        changed = affine.copy()
        changed[:3, axis] *= factor
        return data, changed

    return change


def _keep(change: Callable[[FloatArray], FloatArray]) -> Change:
    return lambda data, affine: (np.asarray(change(data), dtype=np.float32), affine)


def _noise(data: FloatArray) -> FloatArray:
    return data + np.random.default_rng(0).normal(0, 0.5 * data.std(), data.shape).astype(np.float32)


CHANGES: Mapping[str, Change] = {
    "nothing": _keep(lambda d: d),
    "intensities x 2": _keep(lambda d: 2 * d),
    "intensities x 1000": _keep(lambda d: 1000 * d),
    "contrast inverted": _keep(lambda d: d.max() - d),
    "gamma 0.4": _keep(lambda d: d.max() * (d.clip(0) / d.max()) ** 0.4),
    "noise of half a sd": _keep(_noise),
    "clipped above the median": _keep(lambda d: np.minimum(d, np.median(d))),
    "voxels x 2 along one axis": _spacing(2, 1),
    "in metres": lambda d, a: (d, a @ np.diag([1000.0, 1000.0, 1000.0, 1.0])),
    "half the field of view": _keep(lambda d: d[:, :, : d.shape[2] // 2]),
    "every second slice": lambda d, a: (d[..., ::2], a @ np.diag([1.0, 1.0, 2.0, 1.0])),
}


def _prepare(name: str, source: str, work: Path) -> tuple[Path, DatasetIndex]:
    raw = work / name / "raw"
    if not raw.is_dir():
        download.run(DownloadConfig(source=source, patient_pattern=PATIENTS.get(name)), {}, {"dataset": raw})
        config = ValidateConfig(on_invalid="exclude")
        validate.run(config, {"dataset": raw}, {"validation": work / name / "validation"})
    accepted = json.loads((work / name / "validation" / "accepted.json").read_text())["accepted"]
    return raw, DatasetIndex.load(raw).subset(set(accepted))


def measured(root: Path, index: DatasetIndex, case_id: str, plan: Plan, change: Change) -> dict[str, float]:
    """The drift measures of one case after a change, without its label."""
    case = next(c for c in index.cases if c.id == case_id)
    scan, _ = load_case(root, case, index)
    changed = [change(data, scan.affine) for data in scan.intensities()]
    scan = Scan(tuple(Channel(data) for data, _ in changed), changed[0][1], scan.path, None)
    return values_of(measure_scan(scan, plan.channels), plan)


def _rates(rows: list[dict[str, float]], known: Mapping[str, Reference]) -> dict[str, object]:
    by_scan = [check_scan(row, known) for row in rows]
    random = np.random.default_rng(0)
    size = min(SET_SIZE, len(rows))
    sets = [check_set([rows[k] for k in random.choice(len(rows), size, replace=False)], known) for _ in range(SETS)]
    named: dict[str, int] = {}
    for one in by_scan:
        for finding in one[:1]:
            named[finding.measure] = named.get(finding.measure, 0) + 1
    return {
        "scans": len(rows),
        "drift": sum(any(not o.undone for o in one) for one in by_scan) / len(rows),
        "reported_as_undone": sum(any(o.undone for o in one) for one in by_scan) / len(rows),
        "sets_of_10": sum(any(not f.undone for f in one) for one in sets) / SETS,
        "sets_reported_as_undone": sum(any(f.undone for f in one) for one in sets) / SETS,
        "first_named": dict(sorted(named.items(), key=lambda item: -item[1])[:4]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_sets", metavar="NAME=ARCHIVE", nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    prepared = {name: _prepare(name, source, args.work) for name, source in (d.split("=", 1) for d in args.data_sets)}
    for name, (root, index) in prepared.items():
        fold = make_splits(index, count=5, seed=0)[0]
        cases = {c.id: fingerprint_case(root, c, index) for c in index.cases}
        plan = make_plan(index, list(cases.values()), PreprocessConfig())
        held_out = list(fold["held_out"])
        training = [one.scan for case, one in cases.items() if case not in held_out and one.scan is not None]
        known = references(make_distribution(index.name, training, plan), measures_of(plan))
        print(f"{name}: {len(training)} training cases, {len(known)} measures")
        with_labels = [values_of(scan, plan) for c in held_out if (scan := cases[c].scan) is not None]
        print(json.dumps({"held out, with true masks": _rates(with_labels, known)}))
        for change, apply in CHANGES.items():
            rows = [measured(root, index, case, plan, apply) for case in held_out]
            print(json.dumps({change: _rates(rows, known)}), flush=True)
        for other, (other_root, other_index) in prepared.items():
            if other != name and len(other_index.channels) == len(index.channels):
                chosen = [c.id for c in other_index.cases][:50]
                rows = [measured(other_root, other_index, case, plan, CHANGES["nothing"]) for case in chosen]
                print(json.dumps({f"cases of {other}": _rates(rows, known)}), flush=True)


if __name__ == "__main__":
    main()
