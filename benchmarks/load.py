"""Runs many small cases through download, validate, preprocess and one epoch. Prints seconds and peak memory per stage.

    python -m benchmarks.load                     # 1,000 and 10,000 cases of 16 x 16 x 16 voxels
    python -m benchmarks.load --cases 500 5000

Memory must not grow with the number of cases. The last line of the table is the ratio of the memory peaks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import yaml

from benchmarks.pipeline import ROOT, machine, measure

STAGES = ("download", "validate", "preprocess", "train")
SIZE = 16


def write_case(folder: Path, number: int) -> None:
    """Write one volume with a ball, and its label. Every case has a different image."""
    rng = np.random.default_rng(number)
    grid = np.indices((SIZE, SIZE, SIZE)) - rng.uniform(6, 10, (3, 1, 1, 1))
    label = ((grid**2).sum(0) < rng.uniform(9, 25)).astype(np.uint8)
    image = (100 * label + rng.normal(100, 10, label.shape)).astype(np.int16)
    for name, array in (("imagesTr", image), ("labelsTr", label)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / name / f"case_{number:05d}.nii.gz")


def write_dataset(folder: Path, cases: int) -> None:
    """Write a data set in the layout of the Medical Segmentation Decathlon."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_case, [folder] * cases, range(cases), chunksize=100))
    training = [
        {"image": f"./imagesTr/case_{n:05d}.nii.gz", "label": f"./labelsTr/case_{n:05d}.nii.gz"} for n in range(cases)
    ]
    description = {
        "name": "Balls",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "ball"},
        "numTraining": cases,
        "training": training,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def measured(cases: int, work: Path) -> dict[str, dict[str, float]]:
    """Run the stages on `cases` cases. Returns seconds and peak memory per stage."""
    work.mkdir()
    write_dataset(work / "balls", cases)
    shutil.copytree(ROOT / "conf", work / "conf")
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["download"]["source"] = str(work / "balls")
    params["train"] |= {"epochs": 1, "samples_per_case": 1, "validate_every": 1}
    params["tracking"]["enabled"] = False
    (work / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return {stage: measure([sys.executable, "-m", f"distilldsm.components.{stage}"], work) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[1_000, 10_000])
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="load-"))
    try:
        results = {cases: measured(cases, work / str(cases)) for cases in args.cases}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{machine()}\n\n| cases | " + " | ".join(STAGES) + " |\n|---|" + "---|" * len(STAGES))
    for cases, stages in results.items():
        cells = (f"{stages[s]['seconds']:.0f} s, {stages[s]['peak_gb']:.2f} GB" for s in STAGES)
        print(f"| {cases:,} | " + " | ".join(cells) + " |")
    first, last = results[args.cases[0]], results[args.cases[-1]]
    print(
        "| memory, last over first | "
        + " | ".join(f"{last[s]['peak_gb'] / first[s]['peak_gb']:.2f}" for s in STAGES)
        + " |"
    )


if __name__ == "__main__":
    main()
