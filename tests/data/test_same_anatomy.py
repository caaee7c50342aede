"""The same anatomy on another grid: plan and preprocessed arrays are the original's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.config import PreprocessConfig
from distilldsm.core.files import read_json
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.plan import Plan
from distilldsm.data.preprocess import preprocess_dataset
from tests.data.volumes import write_dataset

Change = Callable[[np.ndarray, np.ndarray, bool], tuple[np.ndarray, np.ndarray]]
"""(volume, affine, whether it is a label map) to the changed volume and affine."""
DECIDE = ("spacing_mm", "nonzero_shape", "nonzero_fraction", "foreground_shape", "labels")
"""What of the fingerprint decides the plan, for scans that are not CT."""


def turned(codes: str) -> Change:
    def change(volume: np.ndarray, matrix: np.ndarray, label: bool) -> tuple[np.ndarray, np.ndarray]:
        image = nib.Nifti1Image(volume, matrix)
        wanted = nib.orientations.axcodes2ornt(tuple(codes))
        moved = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(matrix), wanted))
        return np.asarray(moved.dataobj), moved.affine

    return change


def scaled(factor: float, offset: float) -> Change:
    return lambda volume, matrix, label: (volume if label else volume * factor + offset, matrix)


def surrounded(value: float) -> Change:
    """With 100 voxels of one value on each side, unevenly by one."""

    def change(volume: np.ndarray, matrix: np.ndarray, label: bool) -> tuple[np.ndarray, np.ndarray]:
        moved = matrix.copy()
        moved[:3, 3] -= matrix[:3, :3] @ (100, 100, 100)
        return np.pad(volume, ((100, 101), (100, 100), (100, 99)), constant_values=0 if label else value), moved

    return change


def copy_of(root: Path, index: DatasetIndex, target: Path, change: Change) -> Path:
    for case in index.cases:
        for path in (*case.images, case.label):
            image = nib.load(root / path)
            label = path == case.label
            volume, matrix = change(np.asarray(image.dataobj), image.affine, label)
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            kind = np.uint8 if label else np.float32
            nib.save(nib.Nifti1Image(volume.astype(kind), matrix), target / path)
    return target


@pytest.fixture(scope="module", params=["MRI", "CT"])
def original(request, tmp_path_factory) -> tuple[Path, DatasetIndex]:
    """Two small cases in two orientations, and below `out` what preprocessing makes of them."""
    root = tmp_path_factory.mktemp(request.param)
    index = write_dataset(root, cases=2, spacing_mm=(0.7, 1.1, 0.7))
    index = replace(index, channels=(replace(index.channels[0], modality=request.param),))
    prepared(root, index, root / "out")
    return root, index


def prepared(root: Path, index: DatasetIndex, output: Path) -> Path:
    config = PreprocessConfig(folds=2, workers=1, target_spacing_mm=(1.2, 0.9, 0.7))  # coarser, finer, the same
    preprocess_dataset(root, index, config, output)
    return output


@pytest.mark.parametrize(
    ("name", "change", "exact"),
    [
        ("orientation", turned("PIR"), True),
        ("orientation", turned("LSA"), True),
        ("scale", scaled(4.0, 0.0), True),
        ("scale", scaled(0.37, 0.0), False),
        ("scale and offset", scaled(3.0, -50.0), False),
        ("background", surrounded(0.0), True),
        ("background", surrounded(-1024.0), True),
    ],
)
def test_plan_and_arrays_are_the_originals(original, tmp_path, name, change, exact):
    root, index = original
    if index.channels[0].modality == "CT" and name.startswith("scale"):
        return  # Hounsfield units are a scale of their own
    expected = root / "out"
    found = prepared(copy_of(root, index, tmp_path / "changed", change), index, tmp_path / "out")
    plans = [Plan.load(folder / "plan.json") for folder in (expected, found)]
    assert plans[1] == plans[0]
    measured = [read_json(folder / "fingerprint.json")["per_case"] for folder in (expected, found)]
    assert [{key: case[key] for key in DECIDE} for case in measured[1]] == [
        {key: case[key] for key in DECIDE} for case in measured[0]
    ]
    for case in index.cases:
        images = [np.load(folder / "images" / f"{case.id}.npy") for folder in (expected, found)]
        if exact:
            assert np.array_equal(*images)
        else:  # the last bit of half precision
            np.testing.assert_allclose(images[1], images[0], atol=2e-3)
        for folder in ("labels", "locations"):
            assert np.array_equal(*(np.load(at / folder / f"{case.id}.npy") for at in (expected, found)))
        sizes = [read_json(at / "cases" / f"{case.id}.json")["geometry"]["resampled"] for at in (expected, found)]
        assert sizes[0] == sizes[1]
