"""Damages of what the files hold: voxels, label values, and how cases relate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.damages.damage import as_patient, damage, simple
from benchmarks.damages.nifti import affine, raw, replace_content, store, voxels
from distilldsm.data.dataset import Case

Array = np.ndarray


def _change(function: Callable[[Array], Array], dtype: object = None) -> Callable[[Path], object]:
    return lambda path: voxels(path, function, dtype)


def _some(value: float, *, count: int = 5) -> Callable[[Array], Array]:
    def change(data: Array) -> Array:
        data = data.astype(np.float32)
        data.flat[:: max(1, data.size // count)] = value
        return data

    return change


def _padded(data: Array) -> Array:
    data = data.astype(np.float32)
    data[: data.shape[0] // 2] = -1024
    return data


def _nearly_blank(data: Array) -> Array:
    """Everything but a thin slab is nought, as a transfer that stopped leaves it."""
    data = data.copy()
    data[:, :, data.shape[2] // 4 :] = 0
    return data


# Image
simple("image_nan", "image", _change(_some(np.nan), np.float32), finite_voxels="image")
simple("image_infinite", "image", _change(_some(np.inf), np.float32), finite_voxels="image")
simple("image_all_nan", "image", _change(lambda a: np.full(a.shape, np.nan), np.float32), finite_voxels="image")
simple(
    "image_too_large_for_float32",
    "image",
    _change(lambda a: a.astype(np.float64) * 1e60 + 1e60, np.float64),
    finite_voxels="image",
)
simple("image_zero", "image", _change(np.zeros_like), something_to_see="image")
simple("image_constant", "image", _change(lambda a: np.full_like(a, 7)), something_to_see="image")
simple("image_fill_value", "image", _change(_some(1e20), np.float32), severity="warning", plausible_intensities="image")
simple("image_padded", "image", _change(_padded, np.float32), severity="warning", background_is_zero="image")
simple("image_mostly_blank", "image", _change(_nearly_blank), severity="warning", label_on_something="label")
simple("image_4d", "image", _change(lambda a: np.stack([a, a], -1)), declared_channels="image")
simple("image_slice_only", "image", _change(lambda a: a[:, :, a.shape[2] // 2]), readable="image")
simple("image_5d", "image", _change(lambda a: np.stack([a, a], -1)[..., None, :]), readable="image")
simple("image_cropped", "image", _change(lambda a: a[1:-1]), label_of_image_shape="label")


@damage("warning", neighbours_alike="image")
def image_scrambled(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    voxels(root / cases[0].images[0], lambda a: rng.permutation(a.ravel()).reshape(a.shape))


@damage(image_is_no_label="image")
def label_as_image(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    replace_content(root / cases[0].images[0], root / cases[0].label)


@damage(image_is_no_label="image")
def label_as_image_in_floats(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    replace_content(root / cases[0].images[0], root / cases[0].label)
    voxels(root / cases[0].images[0], lambda a: a[::-1], np.float32)


@damage(image_is_no_label="image", declared_labels="label")
def image_and_label_exchanged(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    image, label = root / cases[0].images[0], root / cases[0].label
    voxels(image, lambda a: np.rint(a / max(1e-9, np.abs(a).max()) * 1000), np.int16)
    contents = image.read_bytes(), label.read_bytes()
    label.write_bytes(contents[0])
    image.write_bytes(contents[1])


# Label
simple("label_nan", "label", _change(_some(np.nan), np.float32), finite_label="label")
simple("label_infinite", "label", _change(_some(-np.inf), np.float32), finite_label="label")
simple("label_interpolated", "label", _change(lambda a: a * 0.7, np.float32), whole_number_labels="label")
simple("label_probabilities", "label", _change(lambda a: (a > 0) * 0.93, np.float32), whole_number_labels="label")
simple("label_undeclared", "label", _change(_some(7, count=1), np.uint8), declared_labels="label")
simple("label_255", "label", _change(lambda a: (a > 0) * 255, np.uint8), declared_labels="label")
simple("label_negative", "label", _change(_some(-1), np.int16), declared_labels="label")
simple("label_huge", "label", _change(_some(70000), np.int32), declared_labels="label")
simple("label_empty", "label", _change(np.zeros_like), some_foreground="label")
simple("label_class_lost", "label", _change(lambda a: a * (a != 2)), severity="warning", every_label_present="label")
simple("label_classes_merged", "label", _change(lambda a: a > 0), severity="warning", every_label_present="label")
simple(
    "label_one_hot",
    "label",
    _change(lambda a: np.stack([a == k for k in range(3)], -1)),
    readable="label",
)
simple("label_slice_only", "label", _change(lambda a: a[:, :, a.shape[2] // 2]), readable="label")
simple("label_cropped", "label", _change(lambda a: a[:, :-1]), label_of_image_shape="label")
simple("label_padded", "label", _change(lambda a: np.pad(a, ((0, 1), (0, 0), (0, 0)))), label_of_image_shape="label")
simple("label_half_size", "label", _change(lambda a: a[::2, ::2, ::2]), label_of_image_shape="label")


@damage(declared_labels="label")
def image_as_label(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    path = root / cases[0].images[0]
    replace_content(root / cases[0].label, path)
    voxels(root / cases[0].label, lambda a: np.rint(a / max(1e-9, np.abs(a).max()) * 1000), np.int16)


# Across cases
@damage(cases=2, label_of_image_shape="label")
def labels_exchanged(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    """Cases of different shape; where two cases share a grid, see `docs/validation.md`."""
    one, other = (root / c.label for c in cases)
    if nib.load(one).shape == nib.load(other).shape:
        for file in (cases[1].images[0], cases[1].label):
            voxels(root / file, lambda a: a[:, 1:])
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])


def _copied(root: Path, cases: Sequence[Case]) -> Path:
    """Give the second case the files of the first; returns its image."""
    for a, b in ((cases[0].images[0], cases[1].images[0]), (cases[0].label, cases[1].label)):
        replace_content(root / b, root / a)
    return root / cases[1].images[0]


@damage(cases=2, patient_leakage="image")
def one_patient_under_two_ids(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    _copied(root, cases)


@damage(cases=2, patient_leakage="image")
def leakage_under_another_geometry(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    _copied(root, cases)
    for file in (cases[1].images[0], cases[1].label):
        affine(root / file, lambda m: m @ np.diag([1.5, 2, 1, 1]))


@damage(cases=2, patient_leakage="image")
def leakage_under_another_compression(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    path = _copied(root, cases)
    store(path, raw(path), level=1)


@damage(cases=2, patient_leakage="image")
def leakage_under_another_number_type(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    voxels(_copied(root, cases), lambda a: a, np.float64)


@damage(cases=2, patient_leakage="image")
def leakage_in_another_orientation(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    """Stored right to left and slices first: another array, the same scan."""
    _copied(root, cases)
    for file in (cases[1].images[0], cases[1].label):
        image = nib.load(root / file)
        turned = image.as_reoriented(nib.orientations.axcodes2ornt("SLA"))
        nib.save(turned, root / file)


@damage(cases=2, patient_leakage="image")
def leakage_of_a_mirrored_copy(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    _copied(root, cases)
    for file in (cases[1].images[0], cases[1].label):
        voxels(root / file, lambda a: a[::-1])


@damage(cases=2, patient_leakage="image")
def leakage_with_another_label(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    """One scan drawn by two people, taken for two patients."""
    _copied(root, cases)
    voxels(root / cases[1].label, lambda a: a * (rng.random(a.shape) > 0.05))


@damage("warning", cases=2, image_once_per_patient="image")
def scan_twice_in_a_patient(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> Sequence[Case]:
    _copied(root, cases)
    return cases[0], as_patient(cases[1], cases[0].patient)


@damage("warning", cases=2, label_once="label")
def label_of_another_case(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    path = _copied(root, cases)
    voxels(path, lambda a: np.rint(a * 0.9) + rng.integers(0, 3, a.shape), np.float32)
