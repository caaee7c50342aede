"""Seconds and size of an evaluation's report, besides predicting and scoring.

    python -m benchmarks.report                               # 52 made cases of 64^3 and of 256 x 256 x 128 voxels

The volumes are noise, which no page compresses: the size is the largest there can be.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.pipeline import machine
from distilldsm.data.dataset import Case, DatasetIndex
from distilldsm.evaluation import tables
from distilldsm.evaluation.assemble import Places, write_page
from distilldsm.evaluation.metrics import METRICS
from distilldsm.stage import write_json

LABELS = {"background": 0, "inner": 1, "outer": 2}
SHAPES = ((64, 64, 64), (256, 256, 128))


def made(work: Path, shape: tuple[int, int, int], cases: int) -> tuple[Places, DatasetIndex, list[dict]]:
    """Volumes of noise, masks that differ in places, and scores; all cases share their files."""
    rng = np.random.default_rng(0)
    grid = np.indices(shape) / np.array(shape).reshape(3, 1, 1, 1) - 0.5
    radius = np.sqrt((grid**2).sum(0))
    truth = ((radius < 0.3).astype(np.uint8) + (radius < 0.2)).astype(np.uint8)
    affine = np.diag([1.0, 1.0, 1.5, 1.0])
    places = Places(work=work / "e", dataset=work / "raw", preprocessed=work / "p", model=work / "m")
    for folder in (
        places.work / "predictions",
        places.work / "timing",
        places.dataset,
        places.preprocessed,
        places.model,
    ):
        folder.mkdir(parents=True)
    nib.save(nib.Nifti1Image(rng.integers(0, 4000, shape, dtype=np.int16), affine), places.dataset / "image.nii.gz")
    nib.save(nib.Nifti1Image(truth, affine), places.dataset / "label.nii.gz")
    nib.save(nib.Nifti1Image(np.roll(truth, 2, axis=0), affine), work / "mask.nii.gz")
    names = [f"case_{k:02d}" for k in range(cases)]
    for name in names:
        (places.work / "predictions" / f"{name}.nii.gz").symlink_to(work / "mask.nii.gz")
        write_json(places.work / "timing" / f"{name}.json", {"seconds": 0.1, "peak_memory_gb": 0.5})
    write_json(
        places.model / "history.json", [{"epoch": k, "train_loss": 1 / k, "learning_rate": 1e-3} for k in range(1, 99)]
    )
    write_json(places.model / "cost.json", {"parameters": 1216283, "macs_per_voxel": 42384.0})
    write_json(places.model / "plan.json", {})
    index = DatasetIndex(
        name="Noise",
        channels={"T1": "MRI"},
        labels=LABELS,
        cases=tuple(Case(id=n, patient=n, images=("image.nii.gz",), label="label.nii.gz") for n in names),
    )
    rows = [
        dict.fromkeys(METRICS, 0.5)
        | {"case": name, "label": label, "dice": float(rng.beta(9, 1)), "hd95_mm": float(rng.gamma(2))}
        | {"volume_truth_ml": float(rng.gamma(9)), "volume_predicted_ml": float(rng.gamma(9))}
        for name in names
        for label in ("inner", "outer")
    ]
    return places, index, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=52)
    args = parser.parse_args()
    print(f"{machine()}\n\n| cases of | seconds | MB |\n|---|---|---|")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            places, index, rows = made(Path(folder), shape, args.cases)
            labels = ["inner", "outer"]
            began = time.perf_counter()
            write_page(
                places,
                index,
                index.cases,
                rows,
                title="Noise",
                summary=tables.summarise(rows, labels),
                labels=labels,
                notes=[],
                facts={},
            )
            seconds = time.perf_counter() - began
            size = (places.work / "report.html").stat().st_size / 1e6
            print(f"| {' x '.join(map(str, shape))} | {seconds:.1f} | {size:.1f} |")


if __name__ == "__main__":
    main()
