"""Runs the pipeline on synthetic volumes of full clinical size. Prints seconds and peak memory per stage and case.

    python -m benchmarks.full_size pancreas       # CT 512 x 512 x 120 at 0.8 x 0.8 x 2.5 mm
    python -m benchmarks.full_size brats2020      # four channels of 240 x 240 x 155 at 1 mm

The volumes show ellipsoids in noise, in the layout of the published data set. Time and memory are realistic, scores are
not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.pipeline import PER_FOLD, ROOT, STAGES, machine, measure

SIZES = {"pancreas": ((512, 512, 120), (0.8, 0.8, 2.5)), "brats2020": ((240, 240, 155), (1.0, 1.0, 1.0))}
VALUES = {"pancreas": (1, 2), "brats2020": (2, 1, 4)}


def made(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label, both (X, Y, Z): a body with an organ that has nested parts."""
    shape, _ = SIZES[name]
    rng = np.random.default_rng(seed)
    x, y, z = np.ogrid[: shape[0], : shape[1], : shape[2]]
    centre = np.array(shape) * (0.5 + rng.uniform(-0.05, 0.05, 3))

    def ball(share: float) -> np.ndarray:
        parts = zip((x, y, z), centre, shape, strict=True)
        return sum(((axis - c) / (share * n)) ** 2 for axis, c, n in parts) <= 1

    body = ball(0.42)
    label = np.zeros(shape, dtype=np.uint8)
    for k, value in enumerate(VALUES[name]):
        label[ball(0.16 / (1 + k))] = value
    image = rng.normal(40, 20, shape).astype(np.float32)
    image += 60 * label
    image[~body] = -1000 if name == "pancreas" else 0
    return image, label


def write(name: str, root: Path, cases: int) -> Path:
    """Write the data set to disk. Returns the value for `download.source`."""
    affine = np.diag([*SIZES[name][1], 1.0])
    training = []
    for k in range(cases):
        image, label = made(name, k)
        if name == "brats2020":
            case = f"BraTS20_Training_{k + 1:03d}"
            folder = root / "MICCAI_BraTS2020_TrainingData" / case
            folder.mkdir(parents=True)
            for channel in ("flair", "t1", "t1ce", "t2"):
                nib.save(nib.Nifti1Image(image.astype(np.int16), affine), folder / f"{case}_{channel}.nii.gz")
            nib.save(nib.Nifti1Image(label, affine), folder / f"{case}_seg.nii.gz")
            continue
        for kind, array in (("imagesTr", image.astype(np.int16)), ("labelsTr", label)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), root / kind / f"pancreas_{k:03d}.nii.gz")
        training.append({f: f"./{f}sTr/pancreas_{k:03d}.nii.gz" for f in ("image", "label")})
    if name == "brats2020":
        return root / "MICCAI_BraTS2020_TrainingData"
    description = {
        "name": "made pancreas",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "pancreas", "2": "cancer"},
        "training": training,
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=SIZES)
    parser.add_argument("--cases", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="full-size-") as folder:
        work = Path(folder)
        source = write(args.dataset, work / "source", args.cases)
        (work / "conf").symlink_to(ROOT / "conf")
        values = ["preprocess.folds=2", "train.epochs=1", "train.samples_per_case=2", "tracking.enabled=false"]
        values += ["export.register_model=false", "export.max_voxel_difference=1", "export.int8.enabled=false"]
        command = ["compose", f"dataset={args.dataset}", f"download.source={source}", *values]
        command = [sys.executable, "-m", "distilldsm", *command, "-o", str(work / "params.yaml")]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        rows = {}
        for stage in STAGES:
            rows[stage] = measure([sys.executable, "-m", f"distilldsm.components.{stage}"], work)
        scans = sorted(source.glob("imagesTr/*.nii.gz"))[:1]
        scan = scans[0] if scans else sorted(source.glob("*"))[0]
        out = work / "masks" if args.dataset == "brats2020" else work / "mask.nii.gz"
        predict = ["predict", "export/fold0", str(scan), "-o", str(out)]
        rows["predict"] = measure([sys.executable, "-m", "distilldsm", *predict], work)
        plan = json.loads((work / "data/preprocessed/plan.json").read_text())
    held_out = -(-args.cases // 2)
    # Download, validation and preprocessing process all cases; training takes two patches per case of the other fold.
    of = {"train": (args.cases - held_out) * 2, "evaluate": held_out, "export": held_out, "predict": 1}
    shape, spacing = SIZES[args.dataset]
    print(f"\n{machine()}; {args.cases} cases of {shape} voxels at {spacing} mm")
    print(f"patch {plan['patch_size']}, batch {plan['batch_size']}, median shape {plan['median_shape']}")
    print(f"{'stage':12}{'seconds':>10}{'a case':>10}{'peak GB':>10}")
    for stage, row in rows.items():
        each = row["seconds"] / of.get(stage, args.cases)
        print(f"{stage:12}{row['seconds']:>10}{each:>10.1f}{row['peak_gb']:>10}")
    assert set(PER_FOLD) <= set(rows)


if __name__ == "__main__":
    main()
