"""Prints the plans that the fixed rules make for several data sets, none of them tuned.

    python -m benchmarks.plan --data ../shared/data

The data sets: the embedded sample, hippocampus, ACDC (with its lost and with estimated spacing) and BraTS 2015; and
hippocampus on other grids: 0.5 mm, and 1 x 1 x 3 mm with coarse slices. --write DIR keeps the copies on other grids as
data sets, for trainings with benchmarks.recipe. For them it prints the Dice of the true masks, taken there and back.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from distilldsm.components import download, validate
from distilldsm.config import Params, ValidateConfig
from distilldsm.config.presets import compose
from distilldsm.core.files import read_json
from distilldsm.core.mapping import from_mapping
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.fingerprint import fingerprint_case
from distilldsm.data.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parent.parent
GRIDS = {"0.5 mm": (0.5, 0.5, 0.5), "1 x 1 x 3 mm": (1.0, 1.0, 3.0)}
"""Grids for copies of hippocampus: spacing along the file's axes, mm."""


def resample(volume: npt.NDArray[np.floating], shape: tuple[int, ...], order: int) -> npt.NDArray[np.floating]:
    """A volume on another grid with the same edges; smoothed before it becomes coarser."""
    factors = [new / old for new, old in zip(shape, volume.shape, strict=True)]
    sigma = [np.sqrt(max(f**-2 - 1, 0)) / 2.355 for f in factors]
    smooth = ndimage.gaussian_filter(volume, sigma, mode="nearest")
    zoomed: npt.NDArray[np.floating] = ndimage.zoom(smooth, factors, order=order, mode="nearest", grid_mode=True)
    return zoomed


def resample_labels(labels: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Labels on another grid: the class with the largest share."""
    maps = [resample((labels == k).astype(np.float32), shape, 1) for k in range(int(labels.max()) + 1)]
    return np.argmax(maps, axis=0).astype(np.uint8)


def write_copy(source: Path, target: Path, spacing_mm: tuple[float, float, float]) -> float:
    """Copy a data set in MSD layout to another grid; returns the mean Dice of the true masks there and back."""
    scores = []
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / folder).glob("[!.]*.nii.gz")):
            image = nib.load(path)
            data = np.asarray(image.dataobj)
            old = np.array(image.header.get_zooms()[:3])
            shape = tuple(max(1, round(n * a / b)) for n, a, b in zip(data.shape, old, spacing_mm, strict=True))
            if folder == "labelsTr":
                new: npt.NDArray = resample_labels(data.astype(np.uint8), shape)
                back = resample_labels(new, data.shape)
                scores += [
                    2 * ((data == k) & (back == k)).sum() / ((data == k).sum() + (back == k).sum()) for k in (1, 2)
                ]
            else:
                new = resample(data.astype(np.float32), shape, 3).astype(np.float32)
            step = np.array(data.shape) / shape
            matrix = image.affine.copy()
            matrix[:3, 3] += image.affine[:3, :3] @ ((step - 1) / 2)
            matrix[:3, :3] = matrix[:3, :3] * step
            nib.save(nib.Nifti1Image(new, matrix), target / folder / path.name)
    (target / "dataset.json").write_bytes((source / "dataset.json").read_bytes())
    return float(np.mean(scores))


def plan_of(source: str, preset: str, work: Path, jobs: int) -> tuple[Plan, int]:
    """The plan of a data set with the default parameters, and its number of cases."""
    values = compose(ROOT / "conf", [f"dataset={preset}", f"download.source={source}"])
    params = from_mapping(Params, {"download": values["download"]})
    raw, checked = work / "raw", work / "validation"
    if not raw.is_dir():
        download.run(params.download, {}, {"dataset": raw})
    validate.run(ValidateConfig(on_invalid="exclude"), {"dataset": raw}, {"validation": checked})
    index = DatasetIndex.load(raw).subset(set(read_json(checked / "accepted.json")["accepted"]))
    with ProcessPoolExecutor(jobs) as pool:
        cases = list(pool.map(partial(_fingerprint, raw, index), index.cases, chunksize=8))
    return make_plan(index, cases, params.preprocess, budget=params.train.budget), len(index.cases)


def _fingerprint(raw: Path, index: DatasetIndex, case):  # type: ignore[no-untyped-def]
    return fingerprint_case(raw, case, index)


def data_sets(data: Path, work: Path) -> Iterator[tuple[str, str, str]]:
    """Name, source and preset of each data set; copies are made where they are missing."""
    yield "sample", "sample", "sample"
    yield "hippocampus", str(data / "Task04_Hippocampus.tar"), "hippocampus"
    yield "ACDC, lost spacing", str(data / "Dataset127_ACDC.tar"), "acdc"
    estimated = work / "Dataset127_ACDC_spacing.tar"
    if not estimated.exists():
        command = [sys.executable, "-m", "benchmarks.acdc_spacing", str(data / "Dataset127_ACDC.tar"), str(estimated)]
        subprocess.run(command, check=True, cwd=ROOT)
    yield "ACDC, estimated spacing", str(estimated), "acdc"
    yield "BraTS 2015", str(data / "BraTS2015_subset.tar"), "brats2015"
    original = work / "Task04_Hippocampus"
    if not original.is_dir():
        with tarfile.open(data / "Task04_Hippocampus.tar") as archive:
            archive.extractall(work, filter="data")
    for name, spacing_mm in GRIDS.items():
        target = work / f"hippocampus_{name.replace(' ', '')}"
        if not target.is_dir():
            dice = write_copy(original, target, spacing_mm)
            print(f"hippocampus, {name}: true masks there and back have Dice {dice:.4f}", file=sys.stderr)
        yield f"hippocampus, {name}", str(target), "hippocampus"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--write", type=Path, default=Path("build/plan"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.write.mkdir(parents=True, exist_ok=True)
    print("| data set | cases | depth | spacing mm | median | patch | batch | patches | steps | foreground | largest |")
    print("|---" * 11 + "|")
    for name, source, preset in data_sets(args.data.resolve(), args.write):
        plan, count = plan_of(source, preset, args.write / name.replace(" ", "_").replace(",", ""), args.jobs)
        sizes = [
            " x ".join(f"{v:.3g}" for v in one) for one in (plan.target_spacing_mm, plan.median_shape, plan.patch_size)
        ]
        training = plan.training
        cells = [name, count, f"{plan.depth_axis}{', coarse' if plan.coarse_slices else ''}", *sizes, plan.batch_size]
        cells += [f"{training.patches:,}", f"{training.patches // plan.batch_size:,}"]
        cells += [training.foreground_oversampling, ", ".join(training.keep_largest)]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        for key in ("depth_axis", "target_spacing_mm", "patch_size", "patches"):
            print(f"{name}: {key}: {plan.reasons[key]}", file=sys.stderr)


if __name__ == "__main__":
    main()
