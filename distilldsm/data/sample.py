"""The sample data set: synthetic subjects made from the MNI152 template. Real anatomy without a download.

nilearn's package holds the ICBM 2009a nonlinear symmetric T1 template (MNI, McGill University) with its grey- and
white-matter probability maps. Each subject is this head, cropped and deformed by a smooth invertible field (scaling
and squaring of a random velocity field, Arsigny et al., MICCAI 2006). Each gets its own contrast, bias field and noise,
and is sampled on coarse slices. The sample shows that the pipeline works. It is not a benchmark, because all subjects
come from one template.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import apply_affine
from scipy import ndimage

from distilldsm.config import SampleConfig
from distilldsm.core.errors import UserError
from distilldsm.core.files import whole_file
from distilldsm.core.machine import usable_cores
from distilldsm.core.progress import progress

VERSION = 1
"""Increase this when the same configuration gives other bytes. Then an archive of an older version is not used."""
NAME = "MNI152Sample"
NOTE = (
    "All subjects are deformations of one template head (MNI152, ICBM 2009a): "
    "this data set shows that everything works, it is no benchmark."
)
LICENCE = (
    "ICBM 2009a template: copyright 1993-2004 Louis Collins, McConnell Brain Imaging Centre, "
    "Montreal Neurological Institute, McGill University; free to use with this notice"
)
REFERENCE = "Fonov et al., NeuroImage 54 (2011) 313-327; as distributed with nilearn"
LABELS = {"background": 0, "grey_matter": 1, "white_matter": 2}

_FILES = {
    "t1": "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
    "grey": "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz",
    "white": "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz",
}
_CENTRE_MM = (34.0, -20.0, 10.0)
"""Centre of the block that is used: one hemisphere around the insula, with both tissues in every slice."""
_BLOCK_MM = 104
_FIELD_MM = (72.0, 84.0, 54.0)
"""Field of view of a subject (x, y, z)."""

ORIENTATION_EVERY = 4
"""One of this many subjects is stored as LPS instead of RAS."""
MIN_JACOBIAN = 0.15
"""Smallest local change of volume by a deformation. Above 0, tissue is not folded."""

Float32 = npt.NDArray[np.float32]


def make_sample_archive(path: str | os.PathLike[str], config: SampleConfig) -> Path:
    """Write the sample as a tar in the Medical Segmentation Decathlon's layout. Equal seeds give equal bytes.

    Raises:
        UserError: nilearn's template is not installed.
    """
    path = Path(path)
    template = _load_template()
    with ThreadPoolExecutor(min(usable_cores(), 8)) as pool:
        made = pool.map(lambda k: _subject(template, config.seed, k), range(config.subjects))
        subjects = list(progress(made, total=config.subjects, title="sample", unit="subject"))
    names = [f"subject_{k:03d}" for k in range(config.subjects)]
    description = {
        "name": NAME,
        "description": "Grey and white matter in a block of a deformed MNI152 T1 template",
        "note": NOTE,
        "reference": REFERENCE,
        "licence": LICENCE,
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(v): k for k, v in LABELS.items()},
        "numTraining": config.subjects,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, tarfile.open(temporary, "w") as archive:
        _add(archive, "dataset.json", json.dumps(description, indent=1).encode())
        for name, (image, label) in zip(names, subjects, strict=True):
            _add(archive, f"imagesTr/{name}.nii.gz", image)
            _add(archive, f"labelsTr/{name}.nii.gz", label)
    return path


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(f"{NAME}/{name}")  # fixed owner, mode and time give the same bytes at any time
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _load_template() -> dict[str, Float32]:
    """The block of the template and its maps at 1 mm, (X, Y, Z) in RAS, scaled to 0..1."""
    # Find the files without importing nilearn, which would also import scikit-learn.
    package = importlib.util.find_spec("nilearn")
    folder = Path(package.origin).parent / "datasets" / "data" if package and package.origin else None
    if folder is None or not all((folder / name).is_file() for name in _FILES.values()):
        raise UserError(
            "the sample needs nilearn's MNI152 template",
            where="download.source",
            seen="sample",
            hint="pip install nilearn, or set download.source to your data set",
        )
    block = {}
    for key, name in _FILES.items():
        image = nib.as_closest_canonical(nib.load(folder / name))
        centre = np.rint(apply_affine(np.linalg.inv(image.affine), _CENTRE_MM)).astype(int)
        low = np.maximum(centre - _BLOCK_MM // 2, 0)
        high = np.minimum(low + _BLOCK_MM, image.shape)
        data = np.asanyarray(image.dataobj)[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        block[key] = (data / data.max()).astype(np.float32)
    return block


def _subject(template: dict[str, Float32], seed: int, number: int) -> tuple[bytes, bytes]:
    """Image and label of one subject as .nii.gz bytes."""
    rng = np.random.default_rng([seed, number])
    shape = template["t1"].shape
    positions = _positions(shape, rng)
    t1, grey, white = (
        ndimage.map_coordinates(template[key], positions, order=1, mode="nearest") for key in ("t1", "grey", "white")
    )
    spacing = np.array([1.4, 1.4, 2.5]) * rng.uniform(0.9, 1.1, 3)
    grid = _subject_grid(shape, spacing, rng)
    maps = [_average_slices(m, grid, spacing) for m in (grey, white)]
    label = np.argmax([1 - maps[0] - maps[1], *maps], axis=0).astype(np.uint8)
    image = _acquire(_average_slices(t1, grid, spacing), maps, rng)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = rng.uniform(-60, 60, 3)
    if number % ORIENTATION_EVERY == 3:  # some scanners store LPS; the pipeline must handle both
        image, label = image[::-1, ::-1], label[::-1, ::-1]
        affine[:3, 3] += affine[:3, :3] @ np.array([image.shape[0] - 1, image.shape[1] - 1, 0])
        affine[:3, 0] *= -1
        affine[:3, 1] *= -1
    return _nifti(image.astype(np.int16), affine), _nifti(label, affine)


def _positions(shape: tuple[int, ...], rng: np.random.Generator) -> Float32:
    """Template position of each voxel of a subject, (3, X, Y, Z) voxels: a smooth deformation, then an affine."""
    # Sigma is 12 voxels, so a quarter of the resolution is enough for the field, with 1/64 of the work.
    coarse = tuple(-(-n // 4) for n in shape)
    velocity = np.stack(
        [ndimage.gaussian_filter(rng.normal(size=coarse).astype(np.float32), 3, truncate=3) for _ in range(3)]
    )
    velocity *= rng.uniform(2.5, 4.0) / 4 / velocity.std()
    grid = np.indices(coarse, dtype=np.float32)
    while True:
        moved = _flow(velocity)
        if jacobian_determinant(grid + moved).min() > MIN_JACOBIAN:
            break
        velocity *= 0.8  # scaling and squaring is only approximately invertible; reduce a rare extreme draw
    factors = [n / c for n, c in zip(shape, coarse, strict=True)]
    moved = 4 * np.stack([ndimage.zoom(m, factors, order=1, mode="nearest", grid_mode=True) for m in moved])
    identity = np.indices(shape, dtype=np.float32)
    angles = np.deg2rad(rng.uniform(-6, 6, 3))
    matrix = np.eye(3)
    for k, angle in enumerate(angles):
        a, b = (i for i in range(3) if i != k)
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    matrix = matrix * rng.uniform(0.92, 1.08, 3)
    middle = (np.array(shape, dtype=np.float32)[:, None, None, None] - 1) / 2
    return (np.einsum("ij,jxyz->ixyz", matrix, identity + moved - middle) + middle).astype(np.float32)


def _flow(velocity: Float32) -> Float32:
    """Displacement after unit time along a stationary velocity field; both (3, X, Y, Z) in voxels."""
    grid = np.indices(velocity.shape[1:], dtype=np.float32)
    steps = 5
    # Scaling and squaring: flows of smooth velocities are invertible; plain random displacements are not.
    moved = velocity / 2**steps
    for _ in range(steps):
        at = grid + moved
        moved = moved + np.stack([ndimage.map_coordinates(m, at, order=1, mode="nearest") for m in moved])
    return moved


def jacobian_determinant(positions: Float32) -> Float32:
    """Local change of volume of a mapping (3, X, Y, Z); positive everywhere for an invertible one."""
    gradients = np.stack([np.stack(np.gradient(p)) for p in positions])
    return np.linalg.det(np.moveaxis(gradients, (0, 1), (-2, -1))).astype(np.float32)


def _subject_grid(
    shape: tuple[int, ...], spacing: npt.NDArray[np.floating], rng: np.random.Generator
) -> list[npt.NDArray[np.floating]]:
    """Voxel centres along each axis, in template voxels (1 mm), for a field of view with random size and place."""
    axes = []
    for n, field, step in zip(shape, _FIELD_MM, spacing, strict=True):
        count = int(rng.uniform(0.92, 1.08) * field / step)
        extent = (count - 1) * step
        start = (n - 1 - extent) / 2 + rng.uniform(-4, 4)
        axes.append(start + np.arange(count) * step)
    return axes


def _average_slices(array: Float32, grid: list[npt.NDArray[np.floating]], spacing: npt.NDArray[np.floating]) -> Float32:
    """Sample on the grid after a blur that imitates thick slices: a voxel averages the tissue in it."""
    blurred = ndimage.gaussian_filter(array, 0.35 * (spacing - 0.9))
    points = np.stack(np.meshgrid(*grid, indexing="ij"))
    return ndimage.map_coordinates(blurred, points, order=1, mode="nearest")


def _acquire(t1: Float32, maps: list[Float32], rng: np.random.Generator) -> Float32:
    """Simulate a scanner: tissue contrast, gamma, bias field, Rician noise, an arbitrary intensity scale."""
    signal = t1 ** rng.uniform(0.8, 1.25)
    signal = signal + maps[0] * rng.uniform(-0.05, 0.05) + maps[1] * rng.uniform(-0.05, 0.05)
    bias = ndimage.zoom(rng.normal(size=(3, 3, 3)), [n / 3 for n in t1.shape], order=3)
    signal = signal * np.exp(0.12 * bias / max(float(np.abs(bias).max()), 1e-6))
    level = rng.uniform(0.02, 0.05)
    noise = rng.normal(scale=level, size=(2, *t1.shape))
    return np.hypot(signal + noise[0], noise[1]) * rng.uniform(300, 1500)


def _nifti(array: npt.NDArray, affine: npt.NDArray[np.floating]) -> bytes:
    image = nib.Nifti1Image(np.ascontiguousarray(array), affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
