"""The formats of scans: a new one is a class and an entry in the list, and everything that reads or writes takes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from distilldsm.core.errors import DataError
from distilldsm.io import Channel, Scan, formats, read_labels, read_scan, write_mask
from distilldsm.io.errors import Refuse, raise_error
from distilldsm.io.inputs import check_output, find_inputs, output_path
from tests.data.volumes import affine
from tests.io.test_nifti import write


class Npz:
    """A format of tests: voxels and affine in NumPy's own."""

    name = "npz"
    endings: tuple[str, ...] = (".npz",)
    mask_format = "npz"
    mask_endings = endings
    mask_of_any_scan = True

    def can_read(self, path: Path) -> bool:
        return path.suffix == ".npz"

    def read(self, path: Path, *, refuse: Refuse = raise_error) -> Scan:
        stored = np.load(path)
        return Scan((Channel(stored["voxels"]),), stored["affine"], path, None)

    def check_mask(self, scan: Scan, *, labels: Mapping[str, int], model: str) -> tuple[str, ...]:
        return ()

    def write(self, path: Path, mask: np.ndarray, scan: Scan, *, labels: Mapping[str, int], model: str) -> None:
        np.savez(path, voxels=mask, affine=scan.affine, labels=list(labels), model=model)


def test_a_format_is_added_by_its_class_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Npz()))
    voxels = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", voxels=voxels, affine=affine("LPS", (1, 2, 3)))
    write(tmp_path / "b.nii.gz", voxels)
    found, many, _ = find_inputs([tmp_path], 1)
    assert ([one.name for one in found], many) == (["a", "b"], True)
    scan = found[0].read(1)
    np.testing.assert_array_equal(scan.intensities()[0], voxels)
    assert scan.spacing_mm == (1, 2, 3)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.npz").values, voxels)
    # A mask goes into the scan's own format, or into another one that is asked for by name.
    for output, chosen, wanted in ((tmp_path / "out", None, "a.npz"), (tmp_path / "out", "nifti", "a.nii.gz")):
        path, kind = output_path(found[0], output, True, chosen)
        assert path == output / wanted
        check_output(found[0], path, kind, [])
    path, kind = output_path(found[1], tmp_path / "mask.npz", False, None)
    write_mask(path, voxels, scan, labels={"background": 0, "thing": 1}, model="m")
    assert (kind.name, str(np.load(path)["model"])) == ("npz", "m")
    np.testing.assert_array_equal(read_labels(path, on=scan).values, voxels)
    # A scan of two channels, each in another format.
    with pytest.raises(DataError, match=r"b\.nii\.gz: does not lie on the grid of a\.npz"):
        read_scan([tmp_path / "a.npz", tmp_path / "b.nii.gz"], 2)


def test_what_is_in_no_format_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("no scan")
    (tmp_path / "slice").write_bytes(bytes(128) + b"DICM")
    for name, words in (
        ("gone", "file not found"),
        ("gone.nii", "file not found"),
        ("folder", "holds no scan"),
        ("text.txt", "is not a NIfTI file"),
        ("slice", "is a single DICOM file"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            read_scan([tmp_path / name], 1)
        assert caught.value.where == str(tmp_path / name)
        assert bool(caught.value.hint) == (name == "slice")
    scan = read_scan([write(tmp_path / "a.nii", np.zeros((2, 3, 4), np.uint8))], 1)
    with pytest.raises(DataError, match="is not a file name for a mask"):
        write_mask(tmp_path / "mask.txt", np.zeros((2, 3, 4), np.uint8), scan)


def test_labels_are_whole_numbers_of_a_byte_on_the_grid_of_their_scan(tmp_path):
    values = np.zeros((2, 3, 4), np.float64)
    values[0, 0, 0], values[1, 2, 3] = 254.9995, 1.0005
    labels = read_labels(write(tmp_path / "near.nii", values))
    assert (labels.values.dtype, labels.values[0, 0, 0], labels.values[1, 2, 3], labels.values.sum()) == (
        np.uint8, 255, 1, 256,
    )  # fmt: skip
    assert labels.spacing_mm == pytest.approx((0.7, 0.9, 2.0))
    for value, words in ((0.4, r"not whole numbers(.|\n)*values such as 0\.4"), (-1, "out of range"), (256, "to 256")):
        values[1, 1, 1] = value
        with pytest.raises(DataError, match=words):
            read_labels(write(tmp_path / "odd.nii", values))
    with pytest.raises(DataError, match="wrong number of channels"):
        read_labels(write(tmp_path / "two.nii", np.zeros((2, 3, 4, 2), np.uint8)))
    # Bytes are taken as they are, unless the header scales them.
    stored = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for slope, expected in ((None, stored), ((2, 1), 2 * stored + 1)):
        found = read_labels(write(tmp_path / "bytes.nii.gz", stored, scale=slope)).values
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.uint8
    scan = read_scan([write(tmp_path / "scan.nii", np.zeros((2, 3, 4), np.uint8), affine())], 1)
    for distance, same in ((0.009, True), (0.011, False)):
        matrix = affine()
        matrix[2, 3] += distance
        path = write(tmp_path / "moved.nii", np.zeros((2, 3, 4), np.uint8), matrix)
        if same:
            assert read_labels(path, on=scan).shape == scan.shape
            continue
        with pytest.raises(DataError, match=r"grid of scan\.nii(.|\n)*hint: resample the mask"):
            read_labels(path, on=scan)


def test_the_interface_is_light_until_it_is_used():
    code = "import sys, distilldsm.io; assert not {'nibabel', 'numpy', 'pydicom'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError):
        from distilldsm.io import nothing  # type: ignore[attr-defined]  # noqa: F401
