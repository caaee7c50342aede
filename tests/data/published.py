"""Small made data sets in the layouts and spacings of the published ones, for tests of the presets."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.data.volumes import ellipsoid

SHAPES = {
    "heart": ((40, 44, 14), (1.25, 1.25, 1.37)),
    "hippocampus": ((35, 50, 36), (1.0, 1.0, 1.0)),
    "prostate": ((48, 48, 10), (0.62, 0.62, 3.6)),
    "pancreas": ((56, 56, 14), (0.8, 0.8, 2.5)),
    "brats2020": ((48, 48, 24), (1.0, 1.0, 1.0)),
    "acdc": ((48, 44, 8), (1.5, 1.5, 10.0)),
    "brats2015": ((48, 48, 24), (1.0, 1.0, 1.0)),
}
"""(X, Y, Z) and voxel size in mm; fewer voxels than the real ones, with their anisotropy."""
MSD = {
    "heart": ({"0": "MRI"}, {"0": "background", "1": "left atrium"}),
    "hippocampus": ({"0": "MRI"}, {"0": "background", "1": "Anterior", "2": "Posterior"}),
    "prostate": ({"0": "T2", "1": "ADC"}, {"0": "background", "1": "PZ", "2": "TZ"}),
    "pancreas": ({"0": "CT"}, {"0": "background", "1": "pancreas", "2": "cancer"}),
}

LPS = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239], [0, 0, 1.0, 0], [0, 0, 0, 1]])
"""The affine of the BraTS data sets."""


def made_case(name: str, seed: int, channels: int, values: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray]:
    """Images and label (X, Y, Z): nested structures, the outermost first in `values`."""
    shape, _ = SHAPES[name]
    rng = np.random.default_rng(seed)
    centre = np.array(shape) / 2 + rng.uniform(-1, 1, 3)
    radii = np.array(shape) * rng.uniform(0.3, 0.36, 3)
    label = np.zeros(shape, dtype=np.uint8)
    for k, value in enumerate(values):
        label[ellipsoid(shape, centre, radii * (1 - k / len(values)))] = value
    images = []
    for channel in range(channels):
        image = 120 + 50.0 * np.searchsorted(np.sort(values), label, side="right") * (1 + 0.3 * channel)
        image = np.where(label > 0, image, 60) + rng.normal(0, 12, shape)
        if name == "pancreas":
            image = image - 180  # Hounsfield units, air outside
            image[:4] = -1000
        if name.startswith("brats"):
            image[:, :6] = 0  # skull-stripped
        images.append(image.astype(np.float32))
    return images, label


def write_published(name: str, root: Path, cases: int = 4) -> Path:
    """Write the data set `name` below `root`; returns what `download.source` is to name."""
    _, spacing = SHAPES[name]
    affine = np.diag([*spacing, 1.0])
    if name == "brats2020":
        top = root / "MICCAI_BraTS2020_TrainingData"
        for k in range(cases):
            write_brats_case(top, f"BraTS20_Training_{k + 1:03d}", k)
        return top
    if name == "brats2015":
        for k in range(cases):
            write_brats2015_case(root / ("test" if k % 2 else "train") / f"brats_2013_pat{k + 1:04d}_1", k)
        return root
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    if name == "acdc":
        for k in range(cases):
            for frame in (1, 12):
                images, label = made_case(name, 100 * k + frame, 1, (1, 2, 3))
                case = f"patient{k + 1:03d}_frame{frame:02d}"
                nib.save(nib.Nifti1Image(images[0], affine), root / f"imagesTr/{case}_0000.nii.gz")
                nib.save(nib.Nifti1Image(label, affine), root / f"labelsTr/{case}.nii.gz")
        description = {
            "channel_names": {"0": "cineMRI"},
            "labels": {"background": 0, "RV": 1, "MYO": 2, "LV": 3},
            "numTraining": 2 * cases,
            "file_ending": ".nii.gz",
        }
        (root / "dataset.json").write_text(json.dumps(description))
        return root
    modality, labels = MSD[name]
    training = []
    for k in range(cases):
        values = tuple(range(1, len(labels)))
        # As in prostate_18 and prostate_32, one case lacks the second label.
        images, label = made_case(name, k, len(modality), values[:1] if name == "prostate" and k == 0 else values)
        case = f"{name}_{k:02d}"
        data = np.stack(images, axis=-1) if len(images) > 1 else images[0]
        nib.save(nib.Nifti1Image(data, affine), root / f"imagesTr/{case}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), root / f"labelsTr/{case}.nii.gz")
        training.append({"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"})
    description = {"name": name, "modality": modality, "labels": labels, "training": training, "licence": "made"}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def write_brats_case(root: Path, case: str, seed: int, *, labelled: bool = True) -> Path:
    """One case folder as BraTS 2020 hands it out, in LPS orientation as there."""
    folder = root / case
    folder.mkdir(parents=True)
    images, label = made_case("brats2020", seed, 4, (2, 1, 4))
    for name, image in zip(("flair", "t1", "t1ce", "t2"), images, strict=True):
        nib.save(nib.Nifti1Image(image, LPS), folder / f"{case}_{name}.nii.gz")
    if labelled:
        nib.save(nib.Nifti1Image(label, LPS), folder / f"{case}_seg.nii.gz")
    return folder


def write_brats2015_case(folder: Path, seed: int) -> None:
    """FLAIR and T1c of a case with five labels, as float32 and in LPS orientation as there."""
    folder.mkdir(parents=True)
    images, label = made_case("brats2015", seed, 2, (2, 3, 1, 4))
    for name, image in zip(("Flair", "T1c"), images, strict=True):
        nib.save(nib.Nifti1Image(image, LPS), folder / f"{name}_subtrMeanDivStd.nii.gz")
    nib.save(nib.Nifti1Image(label.astype(np.float32), LPS), folder / "OTMultiClass.nii.gz")
    nib.save(nib.Nifti1Image((label > 0).astype(np.float32), LPS), folder / "brainmask.nii.gz")
