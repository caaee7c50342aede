"""Gives damaged DICOM series and NIfTI files to `io.read_scan`, and counts what comes out.

    python -m benchmarks.fuzz                    # 100,000 inputs: about an hour on one core
    python -m benchmarks.fuzz --seconds 60       # what CI does
    python -m benchmarks.fuzz --only 1234        # one input again, with its traceback

An input is a small series of four slices, or a small NIfTI file, with one to four damages: other values, types and
lengths of attributes or header fields; bytes changed, cut off, put in or repeated; files added, emptied, renamed or
without a prefix. Each input depends on its number only. Right is a scan or one error of ours, within 10 s; and of a
series that is read, slices and files named as left out are together all files. The exit code is 1 if anything else
happened.
"""

from __future__ import annotations

import argparse
import gzip
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset

from benchmarks.pipeline import machine
from distilldsm.core.errors import UserError
from distilldsm.io import Scan, read_scan

LIMIT_SECONDS = 10
SLICES = 4
WORDS = (b"", b"1", b"-1", b"1\\2", b"1\\2\\3", b"0\\0\\0", b"1A", b"nan", b"1e999", b"1,5", b"MOSAIC", b"\xff\xfe\x00")
VRS = ("DS", "IS", "US", "SS", "FD", "FL", "UL", "CS", "LO", "UI", "PN", "SQ", "OB", "OW", "UN", "AT", "DA", "TM")


class TooSlowError(Exception):
    """An input took longer than LIMIT_SECONDS."""


@cache
def series(implicit: bool) -> tuple[bytes, ...]:
    """The files of a series of SLICES slices, 5 x 7."""
    study = pydicom.uid.generate_uid(entropy_srcs=["fuzz"])
    files = []
    for k in range(SLICES):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        one = pydicom.Dataset()
        one.file_meta = meta
        one.SOPClassUID = meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
        one.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = f"{study}.{k}"
        one.StudyInstanceUID = one.SeriesInstanceUID = one.FrameOfReferenceUID = study
        one.Modality, one.PatientName, one.ImageType = "MR", "Nobody^At all", ["ORIGINAL", "PRIMARY", "M"]
        one.NumberOfFrames, one.SliceThickness = 1, 2.5
        one.ImagePositionPatient, one.ImageOrientationPatient = [0, 0, 2.5 * k], [1, 0, 0, 0, 1, 0]
        one.PixelSpacing, one.Rows, one.Columns = [0.9, 0.7], 5, 7
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation = 15, 0
        one.RescaleSlope, one.RescaleIntercept = 1, 0
        one.PixelData = bytes(range(70))
        written = BytesIO()
        one.save_as(written, enforce_file_format=True)
        files.append(written.getvalue())
    return tuple(files)


def attribute(path: Path, rng: random.Random) -> None:
    """Another value, of any type and length, for one attribute; or the attribute removed."""
    try:
        found = pydicom.dcmread(path, force=True)
        tag = rng.choice([*found.keys(), pydicom.tag.Tag(0x00189073), pydicom.tag.Tag("ModalityLUTSequence")])
        if rng.random() < 0.2:
            found.pop(tag, None)
        else:
            content = rng.choice(WORDS) if rng.random() < 0.6 else rng.randbytes(rng.choice((1, 2, 4, 8, 16, 48)))
            found[tag] = RawDataElement(tag, rng.choice(VRS), len(content), content, 0, False, True)
        found.save_as(path)
    except Exception:  # an earlier damage was too great for pydicom to write the file again
        changed_bytes(path, rng)


def changed_bytes(path: Path, rng: random.Random) -> None:
    """Bytes changed, cut off, put in or repeated."""
    content = bytearray(path.read_bytes())
    if not content:
        return
    place, kind = rng.randrange(len(content)), rng.randrange(6)
    if kind == 0:
        del content[place:]
    elif kind == 1:
        content[place:place] = rng.randbytes(rng.randrange(1, 40))
    elif kind == 2:
        content[place:place] = content[place : place + rng.randrange(1, 200)]
    elif kind == 3:
        del content[place : place + rng.randrange(1, 40)]
    elif kind == 4:
        content[place : place + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"SQUN"))
    else:
        for _ in range(rng.randrange(1, 10)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def other_file(folder: Path, rng: random.Random) -> None:
    """A file added to a series, emptied, renamed, removed, or without its preamble."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    if not files:
        return
    one, kind = rng.choice(files), rng.randrange(7)
    if kind == 0:
        (folder / rng.choice(("notes.txt", "DICOMDIR", "x.dcm", "other", "Thumbs.db"))).write_bytes(rng.randbytes(30))
    elif kind == 1:
        one.write_bytes(b"")
    elif kind == 2:
        one.rename(folder / rng.choice(("a.txt", "b.nii", "c", "DICOMDIR")))
    elif kind == 3 and len(files) > 1:
        one.unlink()
    elif kind == 4:
        shutil.copy(one, folder / f"copy{len(files)}-{rng.random()}.dcm")
    elif kind == 5:
        one.write_bytes(one.read_bytes()[132:])
    elif not (folder / f"link{len(files)}.dcm").is_symlink():
        (folder / f"link{len(files)}.dcm").symlink_to(f"gone{rng.random()}")


def nifti(path: Path, rng: random.Random) -> None:
    """A NIfTI file with other header fields, zipped or not, whatever its name says."""
    kind = rng.choice((nib.Nifti1Image, nib.Nifti2Image))
    voxels = np.frombuffer(rng.randbytes(2 * 60), np.int16).reshape(3, 4, 5)
    content = bytearray(kind(voxels, np.diag([0.7, 0.9, 2, 1])).to_bytes())
    for _ in range(rng.randrange(5)):
        place = 2 * rng.randrange((348 if kind is nib.Nifti1Image else 540) // 2)
        whole = rng.choice((0, 1, -1, 2, 16, 64, 2**15 - 1, rng.randrange(-(2**15), 2**15)))
        odd = rng.choice((float(whole), float("nan"), float("inf"), 1e30))
        layout = rng.choice(("<h", "<f", "<q", "<d", ">h"))
        piece = struct.pack(layout, odd if layout in ("<f", "<d") else whole)
        content[place : place + len(piece)] = piece
    content += bytes(rng.choice((0, 0, 0, 1, 500)))
    path.write_bytes(gzip.compress(content, 1, mtime=0) if rng.random() < 0.4 else content)


def make(number: int, work: Path) -> Path:
    """Make input `number` in an empty folder."""
    rng = random.Random(number)
    if rng.random() < 0.4:
        path = work / rng.choice(("scan.nii", "scan.nii.gz", "scan.NII.GZ"))
        nifti(path, rng)
        if rng.random() < 0.3:
            changed_bytes(path, rng)
        return path
    folder = work / "series"
    folder.mkdir()
    for k, content in enumerate(series(rng.random() < 0.3)):
        (folder / f"{k}.dcm").write_bytes(content)
    for _ in range(rng.randrange(1, 5)):
        damage = rng.choice((attribute, attribute, changed_bytes, other_file))
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        if damage is other_file:
            other_file(folder, rng)
        elif files:
            damage(rng.choice(files), rng)
    return folder


def outcome(path: Path) -> str:
    """What reading gives: `read`, or the problem of our error. Anything else is raised."""
    try:
        scan = read_scan([path], 1).load()
    except UserError as error:
        return f"{'series' if path.is_dir() else 'NIfTI'} {error.problem}"
    if path.is_dir():
        everything = [one for one in path.iterdir() if not one.name.startswith(".")]
        assert scan.shape[2] + len(scan.skipped) == len(everything), (scan.shape, scan.skipped, everything)
    _check(scan)
    return f"{'series' if path.is_dir() else 'NIfTI'} read"


def _check(scan: Scan) -> None:
    assert np.isfinite(scan.affine).all()
    assert scan.intensities().shape == (1, *scan.shape)


def run(numbers: range, seconds: float, failed: Callable[[int, BaseException], object]) -> Counter[str]:
    """Read the inputs, for at most `seconds`. Calls `failed` for each that gives neither a scan nor an error."""

    def too_slow(number: int, frame: object) -> None:
        raise TooSlowError(f"more than {LIMIT_SECONDS} s")

    found: Counter[str] = Counter()
    before = signal.signal(signal.SIGALRM, too_slow)
    deadline = time.monotonic() + seconds
    memory = Path("/dev/shm")
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="fuzz-") as folder:
            for number in numbers:
                if time.monotonic() > deadline:
                    break
                work = Path(folder) / str(number)
                work.mkdir()
                path = make(number, work)
                signal.alarm(LIMIT_SECONDS)
                try:
                    found[outcome(path)] += 1
                except Exception as error:
                    found["FAILED"] += 1
                    failed(number, error)
                finally:
                    signal.alarm(0)
                shutil.rmtree(work)
    finally:
        signal.signal(signal.SIGALRM, before)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--only", type=int, help="read one input")
    args = parser.parse_args()
    numbers = range(args.first, args.first + args.inputs) if args.only is None else range(args.only, args.only + 1)
    began = time.monotonic()

    def failed(number: int, error: BaseException) -> None:
        print(f"input {number}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if args.only is not None:
            traceback.print_exception(error)

    found = run(numbers, args.seconds, failed)
    for text, count in found.most_common():
        print(f"{count:7,}  {text}")
    print(f"\n{machine()}, {found.total():,} inputs in {(time.monotonic() - began) / 60:.0f} minutes")
    return 1 if found["FAILED"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
