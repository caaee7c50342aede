"""Small data sets on disk, for tests."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from distilldsm.data.dataset import Case, Channel, DatasetIndex

RAS = np.diag([1.0, 1.0, 1.0, 1.0])


def affine(codes: str = "RAS", spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """An affine whose array axes point to `codes`, e.g. LPS, with that voxel size along the array axes."""
    orientation = nib.orientations.axcodes2ornt(tuple(codes))
    matrix = np.eye(4)
    matrix[:3, :3] = 0
    for axis, (target, sign) in enumerate(orientation):
        matrix[int(target), axis] = sign * spacing_mm[axis]
    matrix[:3, 3] = (-10, 5, 3)
    return matrix


def ellipsoid(shape: tuple[int, int, int], centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    return (((grid - centre) / radii) ** 2).sum(axis=-1) <= 1


def write_case(
    root: Path,
    name: str,
    *,
    shape: tuple[int, int, int] = (12, 20, 18),
    matrix: np.ndarray | None = None,
    channels: int = 1,
    seed: int = 0,
) -> Case:
    """An image with two nested bright structures (labels 1 and 2) in noise."""
    rng = np.random.default_rng(seed)
    matrix = affine() if matrix is None else matrix
    centre = np.array(shape) / 2 + rng.uniform(-1, 1, 3)
    radii = np.array(shape) * rng.uniform(0.25, 0.35, 3)
    label = np.zeros(shape, dtype=np.uint8)
    label[ellipsoid(shape, centre, radii)] = 1
    label[ellipsoid(shape, centre, radii / 2)] = 2
    (root / "imagesTr").mkdir(parents=True, exist_ok=True)
    (root / "labelsTr").mkdir(exist_ok=True)
    images = []
    for channel in range(channels):
        image = 100 + 60.0 * label * (1 + channel) + rng.normal(0, 10, shape)
        path = f"imagesTr/{name}_{channel:04d}.nii.gz"
        nib.save(nib.Nifti1Image(image.astype(np.float32), matrix), root / path)
        images.append(path)
    nib.save(nib.Nifti1Image(label, matrix), root / f"labelsTr/{name}.nii.gz")
    return Case(id=name, patient=name, images=tuple(images), label=f"labelsTr/{name}.nii.gz")


def stretched(path: Path, target: Path, *, scale: float = 1.0, shear: float = 0.0, unit: str = "mm") -> Path:
    """A copy of a NIfTI file whose numbers of geometry are `scale` times as large, in that unit of length."""
    image = nib.load(path)
    matrix = np.diag([scale, scale, scale, 1.0]) @ image.affine
    matrix[:3, 0] += shear * matrix[:3, 1]
    copy = nib.Nifti1Image(np.asanyarray(image.dataobj), matrix)
    copy.header.set_xyzt_units(unit)
    nib.save(copy, target)
    return target


def write_dataset(root: Path, cases: int = 6, *, channels: int = 1, **options) -> DatasetIndex:
    """A data set of small cases, every second one in LPS orientation, with its index saved."""
    index = DatasetIndex(
        name="Ellipsoids",
        channels=tuple(Channel(name=f"T{k}", modality="MRI") for k in range(channels)),
        labels={"background": 0, "shell": 1, "core": 2},
        cases=tuple(
            write_case(
                root,
                f"case_{k:02d}",
                shape=(10 + k % 3, 20, 18),
                matrix=affine("RAS" if k % 2 else "LPS", options.get("spacing_mm", (2.0, 1.0, 1.0))),
                channels=channels,
                seed=k,
            )
            for k in range(cases)
        ),
    )
    index.save(root)
    return index
