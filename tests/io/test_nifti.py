"""Reading NIfTI: nibabel's voxels and geometry, and one clear error for whatever is wrong with a file."""

from __future__ import annotations

import builtins
import errno
import gzip
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distilldsm.core.errors import DataError, UserError
from distilldsm.core.mapping import load_yaml
from distilldsm.inference.windows import Pieces
from distilldsm.io import nifti, read_labels, read_scan, write_mask
from distilldsm.io.formats import read_file
from distilldsm.io.header_rules import FORMS_MM, GEOMETRY_REMARKS, SPACING_DIFFERENCE
from distilldsm.io.nifti import write_nifti
from distilldsm.io.scan import Scan
from tests.data.volumes import affine
from tests.inference.engines import PLAN, Function, in_pieces, neighbours


def intensities(scan: Scan) -> np.ndarray:
    return np.stack([channel.values(channel.raw) for channel in scan.channels])


def assert_read_as_by_nibabel(scan: Scan, path: Path) -> None:
    """Voxels (of a 3-D file) and geometry."""
    image = nib.load(path)
    (found,) = intensities(scan)
    np.testing.assert_array_equal(found, np.asarray(image.dataobj).astype(np.float32))
    np.testing.assert_array_equal(scan.affine, image.affine)


def write(path: Path, data: np.ndarray, matrix: np.ndarray | None = None, *, kind=nib.Nifti1Image, scale=None) -> Path:
    image = kind(data, affine("LPS", (0.7, 0.9, 2.0)) if matrix is None else matrix, dtype=data.dtype)
    if scale is not None:
        image.header.set_slope_inter(*scale)
    nib.save(image, path)
    return path


def claims_much(path: Path) -> Path:
    """A small file whose header says 1200 x 1200 x 1000 voxels, which gzip could hold."""
    header = nib.Nifti1Header()
    header.set_data_shape((1200, 1200, 1000))
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), code=1)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    content = header.binaryblock.ljust(352, b"\0") + np.random.default_rng(0).bytes(2_700_000)
    path.write_bytes(gzip.compress(content, 1))
    return path


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("scale", [None, (0.37, -1024.0)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_voxels_and_geometry_are_nibabels(tmp_path, monkeypatch, dtype, scale, suffix):
    monkeypatch.setattr(nifti, "BLOCK_BYTES", 300)
    rng = np.random.default_rng(0)
    data = rng.normal(50, 20, (7, 5, 9)).astype(dtype)
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        path = write(tmp_path / f"scan{suffix}", data, kind=kind, scale=scale)
        scan = read_scan([path], 1)
        promised = scan.nbytes
        assert_read_as_by_nibabel(scan, path)
        assert scan.shape == (7, 5, 9)
        assert scan.nbytes == promised == scan.channels[0].raw.nbytes
        if np.dtype(dtype).itemsize <= 2:
            assert scan.nbytes == data.nbytes, "kept as it is stored"


def test_byte_order_channels_and_units(tmp_path):
    data = np.random.default_rng(0).normal(size=(4, 5, 6, 2), scale=100).astype(">i2")
    image = nib.Nifti1Image(data, affine(), nib.Nifti1Header(endianness=">"))
    nib.save(image, tmp_path / "four.nii")
    expected = np.moveaxis(data, -1, 0).astype(np.float32)
    np.testing.assert_array_equal(intensities(read_scan([tmp_path / "four.nii"], 2)), expected)
    paths = [write(tmp_path / f"c{k}.nii.gz", data[..., k].astype(np.float32), affine()) for k in range(2)]
    np.testing.assert_array_equal(intensities(read_scan(paths, 2)), expected)
    np.testing.assert_array_equal(intensities(read_scan(paths[::-1], 2)), expected[::-1])
    for unit, length in (("meter", 0.001), ("micron", 1000)):
        image = nib.Nifti1Image(data[..., 0].astype(np.int16), affine("RAS", (length, length, 2 * length)))
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / "unit.nii")
        scan = read_scan([tmp_path / "unit.nii"], 1)
        assert scan.spacing_mm == pytest.approx((1, 1, 2))
        np.testing.assert_allclose(scan.affine[:3, 3], image.affine[:3, 3] / length)
        write_mask(tmp_path / "mask.nii", np.zeros(scan.shape, np.uint8), scan)
        assert nib.load(tmp_path / "mask.nii").header.get_xyzt_units()[0] == unit
        np.testing.assert_array_equal(read_labels(tmp_path / "mask.nii", on=scan).affine, scan.affine)


def test_the_mask_keeps_the_sources_codes_units_and_form(tmp_path):
    for kind, (q, s) in ((nib.Nifti1Image, (1, 0)), (nib.Nifti1Image, (0, 0)), (nib.Nifti2Image, (3, 2))):
        image = kind(np.zeros((4, 5, 6), np.int16), affine("LPS", (0.7, 0.9, 2.0)))
        image.set_qform(affine("LPS", (0.7, 0.9, 2.0)), q)
        image.set_sform(affine("LPS", (0.7, 0.9, 2.0)), s)
        image.header.set_xyzt_units("mm", "sec")
        image.header["descrip"] = b"patient so-and-so"
        nib.save(image, tmp_path / "scan.nii")
        scan = read_scan([tmp_path / "scan.nii"], 1)
        write_mask(tmp_path / "mask.nii.gz", np.ones(scan.shape, np.uint8), scan)
        source, mask = nib.load(tmp_path / "scan.nii"), nib.load(tmp_path / "mask.nii.gz")
        assert type(mask) is type(source)
        np.testing.assert_array_equal(mask.affine, source.affine)
        for key in ("qform_code", "sform_code", "quatern_b", "srow_x", "pixdim"):
            np.testing.assert_array_equal(np.ravel(mask.header[key])[:4], np.ravel(source.header[key])[:4])
        assert mask.header.get_xyzt_units()[0] == "mm"
        assert mask.get_data_dtype() == np.uint8
        assert mask.header["descrip"] == b""
        write_nifti(tmp_path / "maps.nii.gz", np.full((*scan.shape, 2), 51, np.uint8), scan, slope=1 / 255)
        maps = nib.load(tmp_path / "maps.nii.gz")
        assert maps.shape == (4, 5, 6, 2)
        np.testing.assert_allclose(maps.get_fdata(), 0.2, atol=1e-6)
        np.testing.assert_array_equal(maps.affine, source.affine)


def header_bytes(path: Path, **values) -> None:
    """Write fields of the raw header as they are, past every library's care."""
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for key, value in values.items():
        header[key] = value
    content[:348] = header.binaryblock
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_must_be_finite(tmp_path, value):
    data = np.zeros((4, 5, 6), np.float32)
    data[3, 4, 5] = value
    with pytest.raises(DataError, match="not finite"):
        read_scan([write(tmp_path / "scan.nii.gz", data)], 1).load()
    with pytest.raises(DataError, match="not finite"):
        read_scan([write(tmp_path / "big.nii", np.full((2, 2, 2), 1e300))], 1).load()
    with pytest.raises(DataError, match="not finite"):  # only the scaled voxels are too large
        read_scan([write(tmp_path / "scaled.nii", np.full((2, 2, 2), 255, np.uint8), scale=(3e36, 0))], 1).load()


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "SCAN.NII.GZ", "scan", "scan.nii.gz.part"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_content_of_a_file_comes_before_its_name(tmp_path, name, packed):
    data = np.random.default_rng(0).integers(0, 255, (4, 5, 6)).astype(np.uint8)
    plain = write(tmp_path / "plain.nii", data).read_bytes() + bytes(1_000_000)  # as many are tolerated
    (tmp_path / name).write_bytes(gzip.compress(plain) if packed else plain)
    np.testing.assert_array_equal(intensities(read_scan([tmp_path / name], 1))[0], data)


def test_conflicts_of_geometry_are_remarked_on(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4))
    image.set_qform(np.diag([1.4, 1.4, 10, 1]), 1)
    image.set_sform(np.eye(4), 2)
    image.header.set_zooms((1.4, 1.4, 10))
    nib.save(image, tmp_path / "acdc.nii")
    sizes, forms = read_scan([tmp_path / "acdc.nii"], 1).remarks
    assert "acdc.nii: pixdim and affine" in sizes
    assert "pixdim 1.4 x 1.4 x 10, affine 1 x 1 x 1 mm" in sizes
    assert "qform [[1.4, 0.0, 0.0, 0.0]" in forms
    assert "sform [[1.0, 0.0, 0.0, 0.0]" in forms
    assert read_scan([write(tmp_path / "good.nii", np.zeros((4, 5, 6), np.uint8))], 1).remarks == ()
    rules = {rule["rule"]: rule for rule in load_yaml("conf/expectations.yaml")["rules"]}
    for remark, limit in zip(GEOMETRY_REMARKS, (SPACING_DIFFERENCE, FORMS_MM), strict=True):
        rule = rules[remark.name]
        assert (rule["message"], rule["kwargs"]) == (remark.problem, {"max_value": limit}), "validation says the same"


def test_truncated_and_corrupt_files(tmp_path):
    data = np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype(np.uint8)
    plain = write(tmp_path / "scan.nii", data).read_bytes()
    packed = gzip.compress(plain, 1)
    for name, content in {
        "empty.nii": b"",
        "empty.nii.gz": b"",
        "header.nii": plain[:348],
        "short.nii": plain[:-1],
        "short.nii.gz": packed[: len(packed) // 2],
        "checksum.nii.gz": packed[:-8],
        "text.nii": b"not a scan at all" * 100,
        "inner.nii.gz": gzip.compress(plain[:-100]),
        "garbage.nii.gz": packed + b"garbage",
        "surplus.nii.gz": gzip.compress(plain + bytes(1_000_001), 1),
        "surplus.nii": plain + bytes(1_000_001),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"truncated or damaged|not a readable NIfTI|too many bytes"):
            read_scan([path], 1).load()
    # One flipped byte in the middle: voxels may still unpack, but the checksum knows.
    flipped = bytearray(packed)
    flipped[len(flipped) // 2] ^= 0x10
    (tmp_path / "flipped.nii.gz").write_bytes(bytes(flipped))
    with pytest.raises(DataError, match="truncated or damaged"):
        read_scan([tmp_path / "flipped.nii.gz"], 1).load()


def deny(monkeypatch, denied: Path, error: type[OSError], number: int) -> None:
    """What the system answers to any try to open the file: root, whom tests may run as, may read everything."""
    really = builtins.open

    def answer(file, *arguments, **options):
        if not isinstance(file, int) and Path(os.fspath(file)) == denied:
            raise error(number, os.strerror(number), str(file))
        return really(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", answer)
    monkeypatch.setitem(nib.openers.ImageOpener.compress_ext_map, None, (answer, ("mode", "buffering")))


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_file_that_the_system_refuses_is_not_called_damaged(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, np.zeros((4, 5, 6), np.int16))
    for error, number, hint in ((PermissionError, errno.EACCES, "chmod"), (OSError, errno.EIO, "disk")):
        with monkeypatch.context() as patched:
            deny(patched, path, error, number)
            with pytest.raises(DataError, match=f"cannot be read(.|\n)*{os.strerror(number)}(.|\n)*hint: .*{hint}"):
                read_scan([path], 1)
    scan = read_scan([path], 1)
    with monkeypatch.context() as patched:  # taken away between header and voxels
        deny(patched, path, PermissionError, errno.EACCES)
        with pytest.raises(DataError, match="cannot be read"):
            scan.load()
    assert intensities(scan).shape == (1, 4, 5, 6)


def test_channels_must_share_a_grid(tmp_path):
    data = np.zeros((4, 5, 6), np.int16)
    first = write(tmp_path / "a.nii", data, affine())
    moved = affine()
    moved[0, 3] += 0.5
    for name, other in (("b.nii", write(tmp_path / "b.nii", data, moved)), ("c.nii", None)):
        other = other or write(tmp_path / name, data[:3], affine())
        with pytest.raises(DataError, match=r"does not lie on the grid of a\.nii"):
            read_scan([first, other], 2)
    with pytest.raises(DataError, match="wrong number of image files"):
        read_scan([first, first, first], 2)
    with pytest.raises(DataError, match="wrong number of channels"):
        read_scan([first], 2)
    with pytest.raises(DataError, match="file not found"):
        read_scan([tmp_path / "gone.nii"], 1)
    with pytest.raises(DataError, match="more memory than allowed"):
        read_scan([first], 1, limit_bytes=3 * data.size - 1)
    assert read_scan([first], 1, limit_bytes=3 * data.size).shape == data.shape


SMALL = np.random.default_rng(0).integers(-100, 100, (4, 3, 5)).astype(np.int16)
INTERESTING = [0, 1, 2, 3, 127, 128, 255]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 351), st.one_of(st.sampled_from(INTERESTING), st.integers(0, 255))),
        min_size=1,
        max_size=6,
    ),
    packed=st.booleans(),
)
def test_any_header_is_read_as_nibabel_reads_it_or_refused(tmp_path, changes, packed):
    path = tmp_path / ("fuzz.nii.gz" if packed else "fuzz.nii")
    nib.save(nib.Nifti1Image(SMALL, affine("LPS", (0.7, 0.9, 2.0))), tmp_path / "seed.nii")
    content = bytearray((tmp_path / "seed.nii").read_bytes())
    for place, value in changes:
        content[place] = value
    path.write_bytes(gzip.compress(bytes(content), 1) if packed else bytes(content))
    plan = replace(PLAN, class_names=("background", "a", "b"), class_values=(0, 7, 3), target_spacing_mm=(1.5, 1, 1))
    try:
        scan = read_scan([path], 1)
        labels = in_pieces(Function(neighbours), scan, plan, Pieces(window=6)).mask
    except UserError:  # which one for what: the test above
        return
    expected = nib.load(path)
    voxels = np.asarray(expected.dataobj).astype(np.float32)
    assert scan.shape == expected.shape[:3]
    found = intensities(scan)[0]
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, voxels.reshape(scan.shape))
    mask = tmp_path / "mask.nii.gz"
    assert labels.shape == scan.shape
    write_mask(mask, labels, scan)
    np.testing.assert_array_equal(np.asarray(nib.load(mask).dataobj), labels)
    np.testing.assert_array_equal(nib.load(mask).affine, expected.affine)
    assert nib.load(mask).shape == expected.shape[:3]
    np.testing.assert_array_equal(read_file(mask).affine, scan.affine)
