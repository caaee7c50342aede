"""Synthetic DICOM series for tests. pydicom is imported at the first use, because its group is optional."""

from __future__ import annotations

from pathlib import Path

import numpy as np

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_series(
    folder: Path,
    voxels: np.ndarray,
    *,
    orientation=AXIAL,
    spacing=(0.9, 0.7),
    step: float = 2.5,
    origin=(-20.0, 31.0, 4.0),
    slopes=(1.0,),
    intercept: float = 0.0,
    seed: int = 0,
    **attributes,
) -> list[Path]:
    """(slices, rows, columns) int16 as single-frame MR files in shuffled order, under names that say nothing."""
    import pydicom

    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    series, frame, study = (pydicom.uid.generate_uid() for _ in range(3))
    order = np.random.default_rng(seed).permutation(len(voxels))
    paths = []
    for number, k in enumerate(order):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds = pydicom.dataset.Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.SeriesInstanceUID, ds.FrameOfReferenceUID, ds.StudyInstanceUID = series, frame, study
        ds.Modality, ds.PatientName, ds.PatientID, ds.InstanceNumber = "MR", "Nobody", "0", number + 1
        ds.Rows, ds.Columns = voxels.shape[1:]
        ds.PixelSpacing = [float(v) for v in spacing]
        ds.SliceThickness = step
        ds.ImageOrientationPatient = [float(f"{v:.12g}") for v in orientation]
        ds.ImagePositionPatient = [float(f"{v:.12g}") for v in np.array(origin) + k * step * normal]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 1
        if slopes != (1.0,) or intercept:
            ds.RescaleSlope, ds.RescaleIntercept = slopes[k % len(slopes)], intercept
        ds.PixelData = np.ascontiguousarray(voxels[k], dtype="<i2").tobytes()
        for key, value in attributes.items():
            setattr(ds, key, value)
        path = folder / f"file{number}"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return [paths[int(k)] for k in np.argsort(order)]


def other_object(path: Path, source: Path, kind: str) -> None:
    """Another DICOM object of the same patient, without voxels."""
    import pydicom

    found = pydicom.dcmread(source, stop_before_pixels=True)
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = kind
    found.save_as(path)
