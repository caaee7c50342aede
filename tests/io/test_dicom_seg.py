"""DICOM segmentations lie on their series, and are refused before the network runs where they cannot be written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distilldsm.core.errors import DataError
from distilldsm.io import write_mask
from distilldsm.io.dicom import Dicom
from tests.io.dicom_series import write_series
from tests.io.test_dicom import change, read_series, rotation, voxels

pydicom = pytest.importorskip("pydicom", reason="needs the optional group 'dicom'")
hd = pytest.importorskip("highdicom", reason="needs the optional group 'dicom'")
sitk = pytest.importorskip("SimpleITK", reason="the oracle for series")


@pytest.mark.parametrize("empty", [False, True])
def test_a_segmentation_lies_on_its_series(tmp_path, empty):
    turned = rotation((0.3, -0.2, 0.4))
    write_series(tmp_path / "series", voxels(6, 5, 7), orientation=(*turned[:, 0], *turned[:, 1]))
    for path in (tmp_path / "series").iterdir() if empty else ():
        change(path, PatientName=None)  # as anonymised series lack it
    scan = read_series(tmp_path / "series")
    mask = np.zeros(scan.shape, dtype=np.uint8)
    if not empty:
        mask[1:4, 2:5, 1:3] = 1
        mask[4:, :2, 2:5] = 5
    labels = {"background": 0, "anterior": 1, "posterior": 5}
    write_mask(tmp_path / "mask.dcm", mask, scan, labels=labels, model="a model")
    segmentation = hd.seg.segread(tmp_path / "mask.dcm")
    assert [s.SegmentLabel for s in segmentation.SegmentSequence] == ["anterior", "posterior"]
    assert segmentation.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "a model"
    assert segmentation.PatientID == "0"
    first = pydicom.dcmread(next((tmp_path / "series").iterdir()))
    assert segmentation.StudyInstanceUID == first.StudyInstanceUID
    assert segmentation.FrameOfReferenceUID == first.FrameOfReferenceUID
    if empty:
        assert not segmentation.pixel_array.any()
        return
    volume = segmentation.get_volume(combine_segments=True)
    found = np.argwhere(volume.array > 0)
    # In patient coordinates (LPS, mm) segment for segment the voxels of the mask.
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    for number, value in ((1, 1), (2, 5)):
        found = np.argwhere(volume.array == number)
        positions = (volume.affine @ np.c_[found, np.ones(len(found))].T)[:3].T
        wanted = np.argwhere(mask == value)
        expected = (to_ras @ scan.affine @ np.c_[wanted, np.ones(len(wanted))].T)[:3].T
        assert len(positions) == len(expected)
        distances = np.linalg.norm(positions[:, None] - expected[None], axis=-1)
        assert distances.min(axis=1).max() < 1e-3
        assert distances.min(axis=0).max() < 1e-3


def seg_of(folder: Path, out: Path):
    """The SEG of a small mask, written as `predict` does it: checked first. Also the remarks of the check."""
    scan = read_series(folder)
    facts = {"labels": {"background": 0, "thing": 1}, "model": "m"}
    remarks = Dicom().check_mask(scan, **facts)
    mask = np.zeros(scan.shape, dtype=np.uint8)
    mask[1:3, 1:3, 1] = 1
    write_mask(out, mask, scan, **facts)
    found = hd.seg.segread(out)
    assert found.get_volume(combine_segments=True).array.sum() == 4
    return found, remarks


def test_a_segmentation_is_as_tolerant_as_the_reader(tmp_path):
    write_series(tmp_path / "rounded", voxels(4, 5, 7))
    for k, path in enumerate(sorted((tmp_path / "rounded").iterdir())):
        tilt = f"{k * 1e-9:.12f}"
        change(path, ImageOrientationPatient=["1", "0", "0", "0", "1", tilt], PixelSpacing=[0.9, 0.7 + k * 1e-5])
    assert seg_of(tmp_path / "rounded", tmp_path / "rounded.dcm")[1] == ()
    write_series(tmp_path / "frame", voxels(4, 5, 7))
    for path in (tmp_path / "frame").iterdir():
        change(path, FrameOfReferenceUID=None)
    found, remarks = seg_of(tmp_path / "frame", tmp_path / "frame.dcm")
    assert found.FrameOfReferenceUID
    assert "FrameOfReferenceUID" in remarks[0]
    for number, expected in (("100", "ISO_IR 100"), ("6", None), ("87", ["ISO 2022 IR 6", "ISO 2022 IR 87"])):
        folder = tmp_path / f"charset{number}"
        write_series(folder, voxels(4, 5, 7), SpecificCharacterSet=f"ISO 2022 IR {number}", PatientName="Nobody^A")
        found, _ = seg_of(folder, tmp_path / f"{number}.dcm")
        assert found.get("SpecificCharacterSet") == expected
        assert found.PatientName == "Nobody^A"
    name = "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce"
    write_series(tmp_path / "ja", voxels(4, 5, 7), SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name)
    found, _ = seg_of(tmp_path / "ja", tmp_path / "ja.dcm")
    assert found.PatientName == name


def test_a_segmentation_holds_no_free_text_about_the_patient(tmp_path):
    patient = ("PatientComments", "AdditionalPatientHistory", "MedicalAlerts", "Allergies", "Occupation")
    study = ("AdmittingDiagnosesDescription", "ReasonForStudy", "ImageComments", "StudyComments")
    private = dict.fromkeys((*patient, *study), "a private remark")
    write_series(tmp_path / "series", voxels(4, 5, 7), PatientAge="042Y", **private)
    found, _ = seg_of(tmp_path / "series", tmp_path / "mask.dcm")
    assert "private remark" not in str(found)
    assert found.PatientAge == "042Y"


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"SOPInstanceUID": None}, "has no SOPInstanceUID"),
        ({"SOPInstanceUID": "1.2.3"}, "has the SOPInstanceUID of another slice"),
        ({"StudyInstanceUID": None}, "has no StudyInstanceUID"),
        ({"StudyInstanceUID": "1.2.3"}, "does not allow a DICOM SEG"),
        ({"SpecificCharacterSet": "nonsense"}, "does not allow a DICOM SEG"),
    ],
)
def test_a_series_that_allows_no_segmentation_is_refused_before_the_network_runs(tmp_path, attributes, words):
    for path in write_series(tmp_path / "series", voxels(4, 5, 7))[:2]:
        change(path, **attributes)
    scan = read_series(tmp_path / "series")
    with pytest.raises(DataError, match=words) as caught:
        Dicom().check_mask(scan, labels={"background": 0, "thing": 1}, model="m")
    assert caught.value.where.startswith(str(tmp_path / "series"))
    assert "--format nifti" in caught.value.hint
