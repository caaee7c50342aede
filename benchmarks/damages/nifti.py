"""Ways to change NIfTI files that leave everything else in them as it was."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from distilldsm.data.dataset import Case

HEADER = nib.nifti1.header_dtype


def raw(path: Path) -> bytearray:
    """What the compressed file holds."""
    return bytearray(gzip.decompress(path.read_bytes()))


def store(path: Path, content: bytes | bytearray, level: int = 6) -> None:
    """Compress and write; the same content gives the same file."""
    path.write_bytes(gzip.compress(bytes(content), level, mtime=0))


def header(path: Path, **values: object) -> None:
    """Set header fields in the bytes, past everything that nibabel would hint; `pixdim_1` is element 1 of `pixdim`."""
    content = raw(path)
    fields = np.frombuffer(content, HEADER, count=1)  # a view: a bytearray may be written to
    for name, value in values.items():
        known, _, index = (name, "", "") if name in HEADER.names else name.rpartition("_")
        if index:
            fields[known][0, int(index)] = value
        else:
            fields[known][0] = value
    store(path, content)


def field(path: Path, name: str) -> np.ndarray:
    """A header field as it is in the bytes."""
    return np.frombuffer(bytes(raw(path)), HEADER, count=1)[name][0]


def voxels(path: Path, change: Callable[[np.ndarray], np.ndarray], dtype: object = None) -> None:
    """Write a file anew with changed voxels, in its own geometry and number type unless another is given."""
    image = nib.load(path)
    data = np.asarray(change(np.asarray(image.dataobj)))
    kind = np.dtype(image.get_data_dtype() if dtype is None else dtype)  # type: ignore[arg-type]
    fresh = image.header.copy()
    fresh.set_data_dtype(kind)
    nib.save(nib.Nifti1Image(data.astype(kind), None, fresh), path)


def affine(path: Path, change: Callable[[np.ndarray], np.ndarray], *, forms: str = "qs") -> None:
    """Change a file's geometry, in its sform, its qform (where it can hold it) or both, and pixdim with them."""
    image = nib.load(path)
    data = np.asanyarray(image.dataobj)
    fresh, matrix = image.header.copy(), change(image.affine.copy())
    if "q" in forms:
        fresh.set_qform(matrix, code=1, strip_shears=True)
    if "s" in forms:
        fresh.set_sform(matrix, code=1)
    nib.save(nib.Nifti1Image(data, None, fresh), path)


def replace_content(target: Path, source: Path) -> None:
    target.write_bytes(source.read_bytes())


def vary(root: Path, case: Case, rng: np.random.Generator) -> None:
    """Change a copied case a little, so that neither its image nor its label is that of another case."""

    def image(data: np.ndarray) -> np.ndarray:
        step = 1 if data.dtype.kind in "iu" else max(float(np.abs(data).max()) * 1e-3, 1e-6)
        where = rng.random(data.shape) < 0.05
        return np.where(where, data - step * (data > data.mean()) + step * (data <= data.mean()), data)

    def label(data: np.ndarray) -> np.ndarray:
        data = data.copy()
        for value in np.unique(data[data > 0]):
            inside = np.argwhere(data == value)
            if len(inside) > 20:
                data[tuple(inside[rng.choice(len(inside), 3, replace=False)].T)] = 0
        return data

    voxels(root / case.images[0], image)
    voxels(root / case.label, label)


def digests(root: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
