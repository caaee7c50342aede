"""DICOM series: geometry and voxels against SimpleITK, refusals, and segmentations that lie on their series."""

from __future__ import annotations

import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distilldsm.core.errors import DataError
from distilldsm.io import Scan, read_scan
from tests.conftest import SHARED_DATA
from tests.io.dicom_series import other_object, write_series

pydicom = pytest.importorskip("pydicom", reason="needs the optional group 'dicom'")
hd = pytest.importorskip("highdicom", reason="needs the optional group 'dicom'")
sitk = pytest.importorskip("SimpleITK", reason="the oracle for series")


@pytest.fixture(scope="module")
def real() -> Path:
    path = SHARED_DATA / "dicom" / "hippocampus_crop"
    if not path.exists():
        pytest.skip("the DICOM series hippocampus_crop is not on this machine (looked in ../shared/data/dicom)")
    return path


def oracle(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """SimpleITK's voxels as (X, Y, Z), and its geometry as an affine in RAS."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    matrix[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


def read_series(folder: Path, **options) -> Scan:
    return read_scan([folder], 1, **options).load()


def values(scan) -> np.ndarray:
    return scan.channels[0].values(scan.channels[0].raw)


def voxels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-500, 500, shape).astype(np.int16)


def rotation(angles) -> np.ndarray:
    out = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = out @ turn
    return out


def test_a_real_series_is_read_as_by_simpleitk(real):
    scan = read_series(real)
    expected, matrix = oracle(real)
    np.testing.assert_array_equal(values(scan), expected)
    np.testing.assert_allclose(scan.affine, matrix, atol=1e-6)
    assert scan.shape == (35, 51, 32)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    spacing=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)),
    step=st.floats(0.5, 8),
    slope=st.sampled_from([1.0, 0.5, 2.0]),
    intercept=st.sampled_from([0.0, -1024.0]),
)
def test_any_orientation_is_read_as_by_simpleitk(tmp_path, angles, spacing, step, slope, intercept):
    folder = tmp_path / "series"
    shutil.rmtree(folder, ignore_errors=True)
    turned = rotation(angles)
    write_series(
        folder,
        voxels(4, 5, 7),
        orientation=(*turned[:, 0], *turned[:, 1]),
        spacing=[round(v, 6) for v in spacing],
        step=round(step, 4),
        slopes=(slope,),
        intercept=intercept,
    )
    scan = read_series(folder)
    expected, matrix = oracle(folder)
    np.testing.assert_allclose(scan.affine, matrix, atol=1e-4)
    np.testing.assert_array_equal(values(scan), expected.astype(np.float32))
    assert scan.channels[0].raw.dtype == np.int16, "kept as it is stored"


def test_each_slice_may_have_its_own_rescaling(tmp_path):
    data = voxels(4, 5, 7)
    write_series(tmp_path, data, slopes=(1.0, 0.25), intercept=3.0)
    expected = data.transpose(2, 1, 0) * np.array([1.0, 0.25, 1.0, 0.25]) + 3.0
    np.testing.assert_array_equal(values(read_series(tmp_path)), expected.astype(np.float32))


def test_signed_and_unsigned_slices_of_one_series_keep_their_values(tmp_path):
    data = voxels(3, 5, 7)
    data[0] = -400
    paths = write_series(tmp_path, data)
    high = np.full((5, 7), 60_000, np.uint16)
    change(paths[2], PixelRepresentation=0, PixelData=high.tobytes())
    found = values(read_series(tmp_path))
    np.testing.assert_array_equal(found[..., :2], data[:2].transpose(2, 1, 0))
    assert (found[..., 2] == 60_000).all()


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"SliceThickness": 3.0}, 3.0),
        ({"SliceThickness": 3.0, "SpacingBetweenSlices": 4.0}, 4.0),
        ({"SliceThickness": 3.0, "SpacingBetweenSlices": 0.0}, 3.0),
        ({"SliceThickness": 3.0, "SpacingBetweenSlices": float("inf")}, 3.0),
        ({"SliceThickness": None}, None),
        ({"SliceThickness": -1.0}, None),
    ],
)
def test_one_slice_takes_its_distance_or_thickness(tmp_path, attributes, expected):
    (path,) = write_series(tmp_path, voxels(1, 5, 7))
    change(path, **attributes)
    if expected is None:
        with pytest.raises(DataError, match="a single slice without a thickness"):
            read_series(tmp_path)
        return
    scan = read_series(tmp_path)
    assert scan.shape == (7, 5, 1)
    assert scan.spacing_mm == pytest.approx((0.7, 0.9, expected))


def change(path: Path, **attributes) -> None:
    dataset = pydicom.dcmread(path)
    for key, value in attributes.items():
        if value is None:
            delattr(dataset, key)
        else:
            setattr(dataset, key, value)
    dataset.save_as(path)


NAN = float("nan")


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"SeriesInstanceUID": "1.2.3"}, "holds 2 series"),
        ({"PixelSpacing": [0.902, 0.7]}, "the spacing differs"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, "the orientation differs"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 2e-4]}, "the orientation differs"),
        ({"Rows": 4, "Columns": 5, "PixelData": b"\0" * 40}, "the size differs"),
        ({"ImagePositionPatient": None}, "has no ImagePositionPatient"),
        ({"SeriesInstanceUID": None}, "has no SeriesInstanceUID"),
        ({"PixelSpacing": [0.0, 1.0]}, "impossible geometry"),
        ({"PixelSpacing": [1.0, -1.0]}, "impossible geometry"),
        ({"ImagePositionPatient": [-20.0, NAN, 9.0]}, "impossible geometry"),
        ({"SamplesPerPixel": 3}, "colour image"),
        ({"NumberOfFrames": 2}, "several frames"),
        ({"ImagePositionPatient": [-20.0, 31.0, 4.0]}, "two slices at one position"),
        ({"ImagePositionPatient": [-20.0, 31.0, 6.52]}, "two slices at one position"),
        ({"ImagePositionPatient": [-19.93, 31.0, 9.0]}, "does not lie on one regular grid"),
        ({"ImagePositionPatient": [-20.0, 31.07, 9.0]}, "does not lie on one regular grid"),
        ({"ImagePositionPatient": [-20.0, 31.0, 9.07]}, "does not lie on one regular grid"),
        ({"ImagePositionPatient": [-20.0, 31.0, 8.93]}, "does not lie on one regular grid"),
        ({"FrameOfReferenceUID": "1.2.3"}, "frame of reference differs"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}, "is a mosaic"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour image"),
        ({"ModalityLUTSequence": [pydicom.Dataset()]}, "table of intensities"),
        ({"PixelData": None}, "voxels cannot be read"),
        ({"PixelData": b"\0" * 20}, "voxels cannot be read"),
        ({"RescaleSlope": NAN, "RescaleIntercept": 0.0}, "impossible scaling"),
        ({"RescaleSlope": 1.0, "RescaleIntercept": NAN}, "impossible scaling"),
        ({"RescaleSlope": float("inf")}, "impossible scaling"),
    ],
)
def test_mixed_and_broken_series_are_refused(tmp_path, attributes, words):
    paths = write_series(tmp_path, voxels(5, 5, 7))
    change(paths[2], **attributes)
    with pytest.raises(DataError, match=words) as caught:
        read_series(tmp_path)
    assert caught.value.where.startswith(str(tmp_path))
    assert caught.value.seen is not None


@pytest.mark.parametrize(
    "attributes",
    [
        {"PixelSpacing": [0.9009, 0.7]},
        {"ImageOrientationPatient": [1, 0, 0, 0, 1, 9e-5]},
        {"ImagePositionPatient": [-19.96, 31.0, 9.0]},
        {"ImagePositionPatient": [-20.0, 31.0, 9.04]},
        {"NumberOfFrames": 1},
        {"SamplesPerPixel": None},
        {"RescaleSlope": 1.0, "RescaleIntercept": 0.0},
    ],
)
def test_small_differences_between_slices_are_accepted(tmp_path, attributes):
    data = voxels(5, 5, 7)
    change(write_series(tmp_path, data)[2], **attributes)
    scan = read_scan([tmp_path], 1)
    assert scan.spacing_mm == pytest.approx((0.7, 0.9, 2.5), abs=1e-3)
    if "SamplesPerPixel" not in attributes:  # which pydicom needs to decode
        np.testing.assert_array_equal(values(scan), data.transpose(2, 1, 0))


@pytest.mark.parametrize("fault", ["slope", "intercept"])
def test_a_scaling_that_is_not_finite_in_all_slices_is_refused(tmp_path, fault):
    """One scaling for all slices is applied late, to voxels that are finite themselves."""
    slopes, intercept = ((NAN,), 1.0) if fault == "slope" else ((2.0,), float("-inf"))
    write_series(tmp_path, voxels(3, 5, 7), slopes=slopes, intercept=intercept)
    with pytest.raises(DataError, match="impossible scaling"):
        read_scan([tmp_path], 1)


def test_directions_must_have_length_1(tmp_path):
    write_series(tmp_path / "long", voxels(3, 5, 7), orientation=(1, 0, 0, 0, 1.002, 0))
    with pytest.raises(DataError, match="impossible orientation"):
        read_series(tmp_path / "long")
    write_series(tmp_path / "rounded", voxels(3, 5, 7), orientation=(0.9995, 0, 0, 0, 1, 0))
    assert read_series(tmp_path / "rounded").spacing_mm == pytest.approx((0.7, 0.9, 2.5), rel=1e-3)


@pytest.mark.parametrize("place", ["in the voxels", "in another element", "after all"])
def test_more_than_a_megabyte_after_the_voxels_is_refused(tmp_path, place):
    path = write_series(tmp_path, voxels(3, 5, 7))[1]
    content = path.read_bytes()
    for more in (999_900, 1_000_100):
        dataset = pydicom.dcmread(BytesIO(content))
        if place == "in the voxels":
            dataset.PixelData += bytes(more)
        elif place == "in another element":
            dataset.add_new(0x7FE11001, "OB", bytes(more))
        dataset.save_as(path)
        if place == "after all":
            path.write_bytes(content + bytes(more))
        if more > 1_000_000:
            with pytest.raises(DataError, match="too many bytes after its last voxel"):
                read_series(tmp_path)
        elif place != "in the voxels":  # those would be more frames
            assert read_series(tmp_path).shape == (7, 5, 3)


def test_missing_slices_and_strange_files(tmp_path):
    paths = write_series(tmp_path / "gap", voxels(8, 5, 7))
    for missing in (1, 2):
        paths[2 + missing].unlink()
        with pytest.raises(DataError, match=f"gap between slices(.|\\n)*: {missing} missing"):
            read_series(tmp_path / "gap")
    paths = write_series(tmp_path / "cut", voxels(3, 5, 7))
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    with pytest.raises(DataError):
        read_series(tmp_path / "cut")
    with pytest.raises(DataError, match="more memory than allowed"):
        write_series(tmp_path / "large", voxels(3, 5, 7))
        read_series(tmp_path / "large", limit_bytes=3 * 3 * 5 * 7 - 1)
    assert read_series(tmp_path / "large", limit_bytes=3 * 3 * 5 * 7).nbytes == 2 * 3 * 5 * 7


def test_every_file_of_a_series_is_read_or_named_or_refuses_it(tmp_path):
    data = voxels(5, 5, 7)
    paths = write_series(tmp_path, data)
    harmless = {"DICOMDIR", "report", "state", "Notes.TXT", "Thumbs.db", "empty.json", "siemens"}
    other_object(tmp_path / "DICOMDIR", paths[0], pydicom.uid.MediaStorageDirectoryStorage)
    other_object(tmp_path / "report", paths[0], pydicom.uid.BasicTextSRStorage)
    other_object(tmp_path / "state", paths[0], pydicom.uid.GrayscaleSoftcopyPresentationStateStorage)
    other_object(tmp_path / "siemens", paths[0], "1.3.12.2.1107.5.9.1")
    for name in ("Notes.TXT", "Thumbs.db"):
        (tmp_path / name).write_text("no DICOM")
    (tmp_path / "empty.json").touch()
    (tmp_path / ".hidden").touch()
    paths[4].rename(tmp_path / "slice.txt")  # the content decides
    scan = read_series(tmp_path)
    np.testing.assert_array_equal(values(scan), data.transpose(2, 1, 0))
    assert {file.path.name for file in scan.skipped} == harmless
    assert "Basic Text SR" in next(file.reason for file in scan.skipped if file.path.name == "report")
    other = tmp_path / "other"
    for make, words in (
        (other.touch, "is not a DICOM file(.|\n)*starts with nothing"),
        (lambda: other.write_bytes(b"NRRD0004"), "is not a DICOM file(.|\n)*Thumbs.db"),
        (lambda: other.symlink_to("gone"), "link to a file that is missing"),
        (lambda: os.mkfifo(other), "is not a file"),
        (lambda: other.write_bytes(paths[0].read_bytes()[:400]), "has no|cannot be read"),
        (lambda: other_object(other, paths[0], pydicom.uid.MRImageStorage), "two slices|cannot be read"),
        (lambda: other_object(other, paths[0], "1.2.3.4"), "two slices|cannot be read"),
    ):
        make()
        with pytest.raises(DataError, match=f"(?i){words}"):
            read_series(tmp_path)
        other.unlink()


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("removed", ["preamble and meta", "prefix", "preamble", "meta"])
def test_a_slice_without_preamble_or_prefix_is_read(tmp_path, removed, implicit):
    data = voxels(3, 5, 7)
    path = write_series(tmp_path, data)[2]
    found = pydicom.dcmread(path)
    if implicit:
        found.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        found.save_as(path, implicit_vr=True, little_endian=True)
    content = path.read_bytes()
    after_meta = 132 + 12 + int.from_bytes(content[140:144], "little")
    path.write_bytes(
        {
            "preamble and meta": content[after_meta:],
            "prefix": content[:128] + bytes(4) + content[132:],
            "preamble": content[132:],
            "meta": content[:132] + content[after_meta:],
        }[removed]
    )
    np.testing.assert_array_equal(values(read_series(tmp_path)), data.transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("name", "vr", "content"),
    [
        ("NumberOfFrames", "IS", b"1A"),
        ("NumberOfFrames", "IS", b"-1"),
        ("PixelSpacing", "DS", b"1.4 "),
        ("PixelSpacing", "DS", b"1,4\\1,4 "),
        ("PixelSpacing", "DS", b"1_4\\1_4 "),
        ("PixelSpacing", "SQ", b""),
        ("PixelSpacing", "OB", b"\xff\xfe\x00\x01"),
        ("ImagePositionPatient", "DS", b"1\\2\\3\\4 "),
        ("ImagePositionPatient", "FD", bytes(8)),
        ("ImageOrientationPatient", "LO", b"none"),
        ("ImageOrientationPatient", "DS", b""),
        ("Rows", "US", b"\x05"),
        ("Rows", "US", b"\x05\x00\x05\x00"),
        ("Columns", "DS", b"7.5 "),
        ("SeriesInstanceUID", "UI", b"1.2\\1.3"),
        ("RescaleSlope", "DS", b"none"),
        ("RescaleIntercept", "DS", b"1\\2 "),
        ("SamplesPerPixel", "US", b""),
        ("BitsAllocated", "US", bytes(4)),
        ("ImageType", "CS", b"\xff\xff"),
    ],
)
def test_malformed_values_are_an_error_of_the_series_or_do_not_matter(tmp_path, name, vr, content, capfd):
    data = voxels(3, 5, 7)
    path = write_series(tmp_path, data)[1]
    found, tag = pydicom.dcmread(path), pydicom.tag.Tag(name)
    raw = pydicom.dataelem.RawDataElement(tag, vr, len(content), content, 0, False, True)
    with pydicom.config.disable_value_validation():
        found[tag] = raw
        found.save_as(path)
    capfd.readouterr()
    if name == "ImageType":
        np.testing.assert_array_equal(values(read_series(tmp_path)), data.transpose(2, 1, 0))
    else:
        with pytest.raises(DataError, match=f"{name}|Samples per Pixel") as caught:
            read_series(tmp_path)
        assert caught.value.where == str(path)
    assert capfd.readouterr().err == "", "pydicom's own remarks are not ours"


@pytest.mark.parametrize("step", [0.01, 0.3, 2.5, 10.0])
def test_positions_are_compared_with_the_grid_fitted_to_them(tmp_path, step):
    def stack(folder: str, positions) -> Path:
        for path, z in zip(write_series(tmp_path / folder, voxels(len(positions), 5, 7)), positions, strict=True):
            change(path, ImagePositionPatient=[-20.0, 31.0, float(f"{z:.9g}")])
        return tmp_path / folder

    regular = step * np.arange(20.0)
    jitter = np.random.default_rng(0).normal(size=20)
    jitter -= np.polyval(np.polyfit(np.arange(20), jitter, 1), np.arange(20))  # what no regular grid explains
    jitter *= max(0.02, 0.02 * step) / np.abs(jitter).max()
    if step > 0.1:  # else the slices would change places
        assert read_scan([stack("near", regular + 0.98 * jitter)], 1).spacing_mm[2] == pytest.approx(step, rel=1e-6)
        with pytest.raises(DataError, match="regular grid"):
            read_scan([stack("far", regular + 1.02 * jitter)], 1)
    for missing in (1, 10, 18):
        with pytest.raises(DataError, match="gap between slices"):
            read_scan([stack(f"gap{missing}", np.delete(regular, missing))], 1)


def test_a_tilted_stack_is_refused(tmp_path):
    for k, path in enumerate(write_series(tmp_path, voxels(5, 5, 7))):
        change(path, ImagePositionPatient=[-20.0, 31.0 + 0.8 * k, 4.0 + 2.5 * k])
    with pytest.raises(DataError, match="sheared axes"):
        read_series(tmp_path)
