"""NIfTI scans read with the header as it is on disk: what a library would silently repair is refused."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.volumeutils import apply_read_scaling

from distilldsm.core.errors import DataError
from distilldsm.io.scan import Channel, Scan, check_affine
from distilldsm.io.volume import corner_distance_mm, unreadable

BLOCK_BYTES = 16_000_000
MAX_COMPRESSION = 1_100
"""gzip shrinks by no more than 1032; a header that claims more voxels than that is wrong."""
MM_PER_UNIT = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
SAME_GRID_MM = 1e-2
MEND_MASK = "resample the mask to the scan's grid (nearest neighbour), or give the mask of this scan"


@dataclass(frozen=True)
class NiftiFile:
    """A checked header: shape of the file, affine in mm, and the header itself."""

    path: Path
    header: Any
    shape: tuple[int, ...]
    affine: npt.NDArray[np.float64]

    @property
    def volumes(self) -> int:
        """How many 3-D volumes the file holds."""
        return self.shape[3] if len(self.shape) == 4 else 1


def is_nifti_name(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))


def open_nifti(path: Path) -> NiftiFile:
    """Read and check a header.

    Raises:
        DataError: missing, unreadable, or a header that breaks a rule.
    """
    if not path.is_file():
        raise DataError("is a directory" if path.is_dir() else "file not found", where=path)
    size = path.stat().st_size
    try:
        with _open(path) as stream:
            block = stream.read(540)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None
    kind = _kind(block)
    if kind is None:
        raise DataError(
            "is not a readable NIfTI file",
            where=path,
            seen=f"{size} bytes" if len(block) < 348 else f"starts with {block[:4].hex(' ')}",
            rule="one file, .nii or .nii.gz, NIfTI-1 or NIfTI-2",
            hint="convert it (e.g. dcm2niix), or copy it again",
        )
    block = block[: kind.template_dtype.itemsize]
    try:
        raw = kind(block, check=False)
        _check_raw(raw, path)
        header = kind.from_fileobj(io.BytesIO(block))
        offset, kept_shape = int(header.get_data_offset()), tuple(int(n) for n in header.get_data_shape())
        unit = header.get_xyzt_units()[0]
        affine = np.array(header.get_best_affine(), dtype=np.float64)
        header.get_slope_inter()
    except DataError:
        raise
    except Exception as error:  # nibabel raises many kinds for broken headers
        raise DataError("has a damaged NIfTI header", where=path, seen=_first_line(error)) from None
    affine[:3] *= MM_PER_UNIT.get(unit, 1.0)
    check_affine(affine, path)
    claimed = offset + int(np.prod(kept_shape, dtype=object)) * header.get_data_dtype().itemsize
    if claimed > (size * MAX_COMPRESSION + 10_000 if _zipped(path) else size):
        raise DataError(
            "is truncated or damaged",
            where=path,
            seen=f"{size} bytes",
            rule=f"shape {kept_shape} of {header.get_data_dtype()} needs {claimed} bytes",
            hint="copy or export the file again",
        )
    return NiftiFile(path, header, kept_shape, affine)


def read_scan(
    paths: Sequence[Path], channels: int, *, limit_bytes: float = float("inf"), names: Sequence[str] = ()
) -> Scan:
    """One scan: `channels` 3-D files on one grid, or one 4-D file with `channels` volumes.

    names: of the channels, for errors.

    Raises:
        DataError: unreadable file, wrong number of channels, grids that differ, voxels that are not finite, or more
            than `limit_bytes` with the mask.
    """
    files = [open_nifti(path) for path in paths]
    check_size(files[0].path, sum(_stored_bytes(file) for file in files) + math.prod(files[0].shape[:3]), limit_bytes)
    base = files[0]
    for file in files:
        if len(file.shape) not in (3, 4):
            raise DataError(
                "is not a 3-D volume",
                where=file.path,
                seen=f"shape {file.shape}",
                rule="three axes, or four with the channels last",
                hint="a single slice needs a third axis of length 1",
            )
    if len(files) == 1 and channels > 1:
        if base.volumes != channels or len(base.shape) != 4:
            raise DataError(
                "has the wrong number of channels",
                where=base.path,
                seen=f"{base.volumes} (shape {base.shape})",
                rule=f"{wanted_channels(channels, names)}: one 3-D file each, or one 4-D file",
                hint="give a file for each of them, in this order",
            )
        read = _read(base)
    else:
        if len(files) != channels:
            raise DataError(
                "wrong number of image files",
                where=base.path,
                seen=f"{len(files)}: {', '.join(path.name for path in paths)}",
                rule=wanted_channels(channels, names),
                hint="give a file for each of them, in this order",
            )
        read = []
        for file in files:
            if file.volumes != 1:
                raise DataError(
                    "has the wrong number of channels",
                    where=file.path,
                    seen=f"shape {file.shape}",
                    rule="one volume" if channels == 1 else "one volume per file, or one 4-D file for all channels",
                )
            check_same_grid(base.path, base.shape[:3], base.affine, file.path, file.shape[:3], file.affine)
            read += _read(file)
    return Scan(tuple(read), base.affine, base.path, base.header)


def wanted_channels(channels: int, names: Sequence[str] = ()) -> str:
    """How many channels, and which where that is known."""
    return f"{channels} channels" + (f" ({', '.join(names)})" if names else "")


def check_size(path: Path, held_bytes: int, limit_bytes: float) -> None:
    """Raise DataError where image and mask alone take more than `limit_bytes`."""
    if held_bytes > limit_bytes:
        raise DataError(
            "needs more memory than allowed",
            where=path,
            seen=f"image and mask take {held_bytes / 1e9:.2f} GB",
            rule=f"{limit_bytes / 1e9:.2f} GB in all",
            hint="raise --max-memory, or use a machine with more memory",
        )


def check_same_grid(
    path_a: Path,
    shape_a: Sequence[int],
    affine_a: npt.NDArray,
    path_b: Path,
    shape_b: Sequence[int],
    affine_b: Any,
    hint: str = "resample all channels to one grid",
) -> None:
    """Raise DataError, printing both geometries, unless two channels, or a scan and its mask, share a grid."""
    same_shape = tuple(shape_a) == tuple(shape_b)
    if same_shape and corner_distance_mm(affine_a, affine_b, shape_a) <= SAME_GRID_MM:
        return
    raise DataError(
        f"does not lie on the grid of {path_a.name}",
        where=path_b,
        seen=f"shape {tuple(shape_b)}, affine {np.round(affine_b, 4).tolist()}",
        rule=f"shape {tuple(shape_a)}, affine {np.round(affine_a, 4).tolist()}",
        hint=hint,
    )


def _kind(block: bytes) -> Any:
    """The header class that the first bytes ask for; None for anything else, and for header-and-image pairs."""
    for kind, size, magic in ((nib.Nifti1Header, 348, b"n+1\0"), (nib.Nifti2Header, 540, b"n+2\0")):
        start = 344 if size == 348 else 4
        if len(block) >= size and block[start : start + 4] == magic:
            lengths = {int.from_bytes(block[:4], order) for order in ("little", "big")}
            return kind if size in lengths else None
    return None


def _check_raw(raw: Any, path: Path) -> None:
    dimensions = [int(n) for n in raw["dim"]]
    used = dimensions[1 : max(dimensions[0], 0) + 1]
    if not 1 <= dimensions[0] <= 7 or min(used) < 1:
        raise DataError(
            "has an impossible shape", where=path, seen=f"dim {dimensions}", rule="1 or more along each axis"
        )
    if dimensions[0] not in (3, 4):
        raise DataError(
            "is not a 3-D volume",
            where=path,
            seen=f"shape {tuple(used)}",
            rule="three axes, or four with the channels last",
            hint="a single slice needs a third axis of length 1",
        )
    sizes = [float(v) for v in raw["pixdim"][1:4]]
    if not all(np.isfinite(v) and v > 0 for v in sizes):
        raise DataError(
            "has an impossible voxel size",
            where=path,
            seen=f"pixdim {sizes}",
            rule="three numbers above 0 (mm)",
            hint="write the voxel size into the header; libraries would silently take 1 mm or drop the sign",
        )
    dtype = raw.get_data_dtype()
    if dtype.kind not in "iuf":
        raise DataError("holds no plain numbers", where=path, seen=str(dtype), rule="integers or floats, no colours")
    scaling = [float(raw["scl_slope"]), float(raw["scl_inter"])]
    if not all(np.isfinite(v) for v in scaling):
        raise DataError(
            "has an impossible scaling",
            where=path,
            seen=f"scl_slope {scaling[0]:g}, scl_inter {scaling[1]:g}",
            rule="finite numbers (slope 0: none)",
            hint="set scl_slope and scl_inter",
        )
    offset = float(raw["vox_offset"])
    if not (np.isfinite(offset) and raw.single_vox_offset <= offset and offset == int(offset)):
        raise DataError(
            "has an impossible start of the voxels",
            where=path,
            seen=f"vox_offset {offset:g}",
            rule=f"a whole number from {raw.single_vox_offset}",
        )


def _stored_type(header: Any) -> tuple[np.dtype, bool]:
    """The type voxels are kept in, and whether that is the file's own: small integers, and float32 without scaling."""
    dtype = header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    scaled = slope is not None and (slope != 1 or inter != 0)
    keep = (dtype.kind in "iu" and dtype.itemsize <= 2) or (dtype == np.dtype(np.float32) and not scaled)
    return (dtype.newbyteorder("=") if keep else np.dtype(np.float32)), keep


def _stored_bytes(file: NiftiFile) -> int:
    return math.prod(file.shape) * _stored_type(file.header)[0].itemsize


def _read(file: NiftiFile) -> list[Channel]:
    """The voxels of a file, volume by volume, read once from front to back."""
    header = file.header
    dtype = header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    scaled = slope is not None and (slope != 1 or inter != 0)

    def scale(piece: npt.NDArray) -> npt.NDArray:
        return apply_read_scaling(piece, np.float64(slope), np.float64(inter))

    stored, keep = _stored_type(header)
    x, y, z = file.shape[:3]
    out = []
    try:
        with _open(file.path) as stream:
            _skip(stream, int(header.get_data_offset()))
            for _ in range(file.volumes):
                array = np.empty((x, y, z), dtype=stored, order="F")
                step = max(1, BLOCK_BYTES // (x * y * dtype.itemsize))
                for start in range(0, z, step):
                    stop = min(start + step, z)
                    block = np.empty((x, y, stop - start), dtype=dtype, order="F")
                    _fill(stream, block)
                    with np.errstate(over="ignore", invalid="ignore"):
                        values = scale(block) if scaled and not keep else block
                        array[..., start:stop] = values
                        _check_finite(scale(block) if scaled else array[..., start:stop], file.path)
                out.append(Channel(array, scale if scaled and keep else None))
            # To the end, as gzip's checksum stands there.
            while stream.read(BLOCK_BYTES):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(file.path, error) from None
    return out


def _check_finite(values: npt.NDArray, path: Path) -> None:
    if values.dtype.kind != "f":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(np.asarray(values, dtype=np.float32))
    if not finite.all():
        raise DataError(
            "holds voxels that are not finite",
            where=path,
            seen=f"{int((~finite).sum())} voxels NaN, infinite or beyond float32, at the first place found",
            rule="finite numbers",
            hint="replace them, e.g. by the value of air",
        )


def _fill(stream: BinaryIO, block: npt.NDArray) -> None:
    view = memoryview(cast(Any, block.reshape(-1, order="F").view(np.uint8)))
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{len(view) - done} bytes of voxels are missing")
        done += count


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0:
        got = len(stream.read(min(count, BLOCK_BYTES)))
        if not got:
            raise EOFError("the file ends before its voxels")
        count -= got


def _zipped(path: Path) -> bool:
    return path.name.endswith(".gz")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if _zipped(path) else open(path, "rb")


def _damaged(path: Path, error: BaseException) -> DataError:
    return unreadable(path, error) or DataError(
        "is truncated or damaged", where=path, seen=_first_line(error), hint="copy or export the file again"
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
