"""Writes masks as DICOM SEG that refer to their series. Needs highdicom, which is imported only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.core.version import __version__
from distilldsm.io.dicom_slice import Slice, dataset, quiet, value
from distilldsm.io.errors import first_line

_MUST_EXIST = (
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyID",
    "StudyTime",
)
"""Attributes that a DICOM object must have; they may be empty. Anonymised series often lack them."""
_CITED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
"""Attributes of a slice by which a SEG cites it. They cannot be supplied."""
_COPIED = (
    *("DeidentificationMethod", "IssuerOfPatientID", "Manufacturer", "Modality", "PatientAge"),
    *("PatientIdentityRemoved", "PatientSize", "PatientWeight", "PositionReferenceIndicator", "SpacingBetweenSlices"),
    *("SliceThickness", "StudyDescription"),
)
"""Further attributes that a SEG may take from its series. Free text about the patient is not among them."""
_MULTI_BYTE = ("58", "87", "149", "159")
NO_FRAME = "the series has no FrameOfReferenceUID; the segmentation gets a new one"


def segmentation(
    folder: Path,
    slices: Sequence[Slice],
    mask: npt.NDArray[np.uint8],
    labels: Mapping[str, int],
    model: str,
) -> Any:
    """The SEG of a mask (X, Y, Z) on a series: one binary segment per label, without empty frames.

    Raises:
        DataError: the headers of the series, which lies in `folder`, do not allow it.
    """
    import highdicom as hd
    from pydicom.uid import ExplicitVRLittleEndian

    foreground = {name: value for name, value in labels.items() if value != 0}
    table = np.zeros(256, dtype=np.uint8)
    table[list(foreground.values())] = np.arange(1, len(foreground) + 1)
    frames = np.ascontiguousarray(table[mask].transpose(2, 1, 0))
    try:
        with quiet():
            return hd.seg.Segmentation(
                source_images=_cited(slices),
                pixel_array=frames,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=_segments(foreground, model),
                series_instance_uid=hd.UID(),
                series_number=1000,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="distilldsm",
                manufacturer_model_name=model[:64],
                software_versions=__version__,
                device_serial_number="0",
                content_description="research; not a medical device",
                transfer_syntax_uid=ExplicitVRLittleEndian,
                omit_empty_frames=bool(frames.any()),
            )
    except DataError:
        raise
    except Exception as error:  # highdicom and pydicom raise many kinds for unusual headers
        raise DataError(
            "does not allow a DICOM SEG",
            where=folder,
            seen=first_line(error),
            rule="headers as the DICOM standard requires for an image",
            hint="write NIfTI instead: --format nifti",
        ) from None


def _segments(foreground: Mapping[str, int], model: str) -> list[Any]:
    """A description of each segment; they are numbered from 1."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name=model[:64], version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    return [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=hd.sr.CodedConcept(f"label-{value}"[:16], "99DISTILLDSM", name[:64]),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, (name, value) in enumerate(foreground.items(), start=1)
    ]


def _cited(slices: Sequence[Slice]) -> list[Any]:
    """The slices as highdicom needs them: on exactly one grid, in one frame of reference, without what is private."""
    from pydicom.uid import generate_uid

    frame = next((one.frame_of_reference for one in slices if one.frame_of_reference), None) or generate_uid()
    cited = [_source(one, slices[0], frame) for one in slices]
    first: dict[str, Slice] = {}
    for one, source in zip(slices, cited, strict=True):
        other = first.setdefault(str(source.SOPInstanceUID), one)
        if other is not one:
            raise DataError(
                "has the SOPInstanceUID of another slice, by which a DICOM SEG cites it",
                where=one.path,
                seen=f"{source.SOPInstanceUID}, as in {other.path.name}",
                hint="write NIfTI instead: --format nifti",
            )
    return cited


def _source(one: Slice, first: Slice, frame: str) -> Any:
    from pydicom import Dataset

    (header, _), out = dataset(one.path), Dataset()
    for name in _CITED:
        found = value(header, name, one.path)
        if found is None:
            raise DataError(
                f"has no {name}, by which a DICOM SEG cites it",
                where=one.path,
                hint="write NIfTI instead: --format nifti",
            )
        setattr(out, name, found)
    character_set = _character_set(value(header, "SpecificCharacterSet", one.path))
    if character_set is not None:
        out.SpecificCharacterSet = character_set
    for name in (*_MUST_EXIST, *_COPIED):
        found = value(header, name, one.path)
        if found is not None or name in _MUST_EXIST:
            setattr(out, name, "" if found is None else found)
    out.FrameOfReferenceUID = frame
    out.Rows, out.Columns = one.size
    out.PixelSpacing = list(first.spacing_mm)
    # Rounded in some files; the reader has checked that the slices agree.
    out.ImageOrientationPatient = [float(f"{v:.12g}") for v in first.directions.ravel()]
    out.ImagePositionPatient = [float(f"{v:.12g}") for v in one.position]
    return out


def _character_set(found: Any) -> Any:
    """A character set as highdicom accepts it: `ISO 2022 IR n` may not stand alone, an empty first one is ASCII."""
    if not isinstance(found, str) and found is not None:
        return [one or "ISO 2022 IR 6" for one in found]
    number = found.removeprefix("ISO 2022 IR ") if isinstance(found, str) and found.startswith("ISO 2022 IR ") else None
    if number is None:
        return found
    if number == "6":
        return None
    return ["ISO 2022 IR 6", found] if number in _MULTI_BYTE else f"ISO_IR {number}"
