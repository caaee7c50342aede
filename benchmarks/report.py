"""Measures the seconds to write an evaluation's page (without predicting and scoring), and its size.

    python -m benchmarks.report                # 52 synthetic cases of 64 x 64 x 64 and of 256 x 256 x 128 voxels

The volumes are noise, which does not compress: a page of as many real cases is never larger.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.pipeline import machine
from distilldsm.config import EvaluateConfig
from distilldsm.core.files import write_json
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.evaluation import tables
from distilldsm.evaluation.metrics import METRICS
from distilldsm.evaluation.report import Evaluation, write_report

LABELS = ("inner", "outer")
SHAPES = ((64, 64, 64), (256, 256, 128))


def made(work: Path, shape: tuple[int, int, int], cases: int) -> tuple[Evaluation, float]:
    """An evaluation of noise volumes with differing masks, and the CPU seconds for its confidence intervals.

    All cases share the same files.
    """
    rng = np.random.default_rng(0)
    grid = np.indices(shape) / np.array(shape).reshape(3, 1, 1, 1) - 0.5
    radius = np.sqrt((grid**2).sum(0))
    truth = ((radius < 0.3).astype(np.uint8) + (radius < 0.2)).astype(np.uint8)
    affine = np.diag([1.0, 1.0, 1.5, 1.0])
    inputs = {name: work / name for name in ("dataset", "preprocessed", "model")}
    for folder in (*inputs.values(), work / "e" / "predictions"):
        folder.mkdir(parents=True)
    nib.save(nib.Nifti1Image(rng.normal(size=shape).astype(np.float32), affine), inputs["dataset"] / "image.nii.gz")
    nib.save(nib.Nifti1Image(truth, affine), inputs["dataset"] / "label.nii.gz")
    nib.save(nib.Nifti1Image(np.roll(truth, 2, axis=0), affine), work / "mask.nii.gz")
    names = [f"case_{k:02d}" for k in range(cases)]
    for name in names:
        (work / "e" / "predictions" / f"{name}.nii.gz").symlink_to(work / "mask.nii.gz")
    history = [{"epoch": k, "train_loss": 1 / k, "learning_rate": 1e-3} for k in range(1, 99)]
    write_json(inputs["model"] / "history.json", history)
    network = {"name": "distill_dsm", "options": {}, "parameters": 1216283, "macs_per_voxel": 42384.0, "epochs": 98}
    write_json(inputs["model"] / "model.json", network)
    channels = [{"name": "T1", "modality": "MRI"}]
    plan = {"depth_axis": "z", "target_spacing_mm": [1.5, 1, 1], "patch_size": [64, 64, 64], "batch_size": 2}
    write_json(inputs["model"] / "plan.json", {**plan, "channels": channels, "normalisation": [{"scheme": "zscore"}]})
    index = DatasetIndex(
        name="Noise",
        channels=(Channel(name="T1", modality="MRI"),),
        labels={"background": 0, "outer": 1, "inner": 2},
        cases=tuple(Case(id=n, patient=n, images=("image.nii.gz",), label="label.nii.gz") for n in names),
    )
    rows = [
        dict.fromkeys(METRICS, 0.5)
        | {"case": name, "label": label, "dice": float(rng.beta(9, 1)), "hd95_mm": float(rng.gamma(2))}
        | {"volume_truth_ml": float(rng.gamma(9)), "volume_predicted_ml": float(rng.gamma(9))}
        for name in names
        for label in LABELS
    ]
    began = time.process_time()
    confidence_intervals = tables.intervals(rows, LABELS)
    seconds = time.process_time() - began
    evaluation = Evaluation(
        config=EvaluateConfig(),
        inputs=inputs,
        index=index,
        cases=index.cases,
        fold=0,
        labels=LABELS,
        rows=rows,
        summary=tables.summarise(rows, LABELS),
        intervals=confidence_intervals,
        prediction_cost={},
        training_cost={},
    )
    return evaluation, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=52)
    args = parser.parse_args()
    print(f"{machine()}\n\n| {args.cases} cases of | intervals, CPU s | page, s | page, CPU s | MB |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            evaluation, intervals_s = made(Path(folder), shape, args.cases)
            began, cpu = time.perf_counter(), time.process_time()
            write_report(Path(folder) / "e", evaluation)
            page_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
            size = (Path(folder) / "e" / "report.html").stat().st_size / 1e6
            print(f"| {' x '.join(map(str, shape))} | {intervals_s:.1f} | {page_s:.1f} | {cpu_s:.1f} | {size:.1f} |")


if __name__ == "__main__":
    main()
