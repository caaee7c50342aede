"""Damages of the header: number type, dimensions, scaling, geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.damages.damage import damage, simple
from benchmarks.damages.nifti import affine, field, header, raw, store, voxels
from distilldsm.data.dataset import Case

BOTH = ("qform_code", "sform_code")


def _set(**values: object) -> Callable[[Path], object]:
    return lambda path: header(path, **values)


def _matrix(function: Callable[[np.ndarray], np.ndarray], forms: str = "qs") -> Callable[[Path], object]:
    return lambda path: affine(path, function, forms=forms)


def _scaled(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda m: m @ np.diag([factor, factor, factor, 1])


def _moved(x: float, y: float = 0, z: float = 0) -> Callable[[np.ndarray], np.ndarray]:
    def change(matrix: np.ndarray) -> np.ndarray:
        matrix[:3, 3] += (x, y, z)
        return matrix

    return change


def _turned(degrees: float) -> Callable[[np.ndarray], np.ndarray]:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return lambda m: np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ m


def _sheared(matrix: np.ndarray) -> np.ndarray:
    return matrix @ np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


# Voxel size
for _name, _value in {"zero": 0.0, "negative": -1.0, "nan": np.nan, "infinite": np.inf}.items():
    simple(f"pixdim_{_name}", "image", _set(pixdim_2=_value), usable_header="image")
simple(
    "pixdim_of_another_scan",
    "image",
    lambda p: header(p, pixdim_3=field(p, "pixdim")[3] * 2),
    severity="warning",
    one_voxel_size="image",
)
simple(
    "pixdim_in_metres",
    "image",
    lambda p: header(p, **{f"pixdim_{k}": field(p, "pixdim")[k] / 1000 for k in (1, 2, 3)}),
    severity="warning",
    one_voxel_size="image",
)
simple("metres", "both", _matrix(_scaled(1e-3)), usable_header="image", plausible_spacing_fine="image")
simple("micrometres", "both", _matrix(_scaled(1e3)), usable_header="image", plausible_spacing_coarse="image")
simple("unit_metre", "image", _set(xyzt_units=1), usable_header="image", millimetres="image")
simple("unit_micron", "image", _set(xyzt_units=3), usable_header="image", millimetres="image")
simple("unit_unheard_of", "image", _set(xyzt_units=6), usable_header="image", millimetres="image")

# Place and direction
simple("sform_nan", "image", _set(srow_y_1=np.nan), usable_header="image")
simple("sform_infinite", "image", _set(srow_x_3=np.inf), usable_header="image")
simple("sform_zero", "image", _set(srow_x=0, srow_y=0, srow_z=0), usable_header="image")
simple("sform_axis_lost", "image", _set(srow_z=(0, 0, 0, 5)), usable_header="image")
simple("sform_axes_alike", "image", lambda p: header(p, srow_z=field(p, "srow_y")), usable_header="image")
simple(
    "sform_moved_in_both",
    "both",
    _matrix(_moved(12), "s"),
    severity="warning",
    qform_agrees_with_sform="image",
)
simple("sform_turned", "image", _matrix(_turned(20), "s"), label_on_image_grid="label", qform_agrees_with_sform="image")
simple("qform_moved", "image", _matrix(_moved(0, 7), "q"), severity="warning", qform_agrees_with_sform="image")
simple("qform_nan", "image", _set(quatern_b=np.nan), severity="warning", sound_header="image")
simple("qform_no_rotation", "image", _set(quatern_b=0.9, quatern_c=0.9), severity="warning", sound_header="image")
simple("forms_unheard_of", "image", _set(sform_code=77), severity="warning", sound_header="image")
simple("qfac_unheard_of", "image", _set(pixdim_0=0.5), severity="warning", sound_header="image")
simple(
    "geometry_lost",
    "both",
    _set(qform_code=0, sform_code=0),
    severity="warning",
    geometry_present="image",
)
simple("geometry_lost_in_the_image", "image", _set(qform_code=0, sform_code=0), label_on_image_grid="label")
simple("sheared", "both", _matrix(_sheared, "s"), usable_header="image")
simple("image_moved", "image", _matrix(_moved(0, 0, 3)), label_on_image_grid="label")
simple("image_spacing_lost", "image", _matrix(_scaled(1.25)), label_on_image_grid="label")
simple("label_moved", "label", _matrix(_moved(0.5)), label_on_image_grid="label")
simple("label_turned", "label", _matrix(_turned(90)), label_on_image_grid="label")
simple("label_left_is_right", "label", _matrix(lambda m: np.diag([-1, 1, 1, 1]) @ m), label_on_image_grid="label")
simple("label_without_geometry", "label", _matrix(lambda m: np.diag([3.0, 3, 3, 1])), label_on_image_grid="label")
simple("label_spacing_wrong", "label", _matrix(_scaled(2)), label_on_image_grid="label")
simple("label_sform_nan", "label", _set(srow_x_0=np.nan), usable_header="label")

# Number type
simple("datatype_unknown", "image", _set(datatype=77), readable="image")
simple("datatype_colour", "image", _set(datatype=128, bitpix=24), readable="image")
simple("datatype_complex", "image", _set(datatype=32, bitpix=64), readable="image")
simple("datatype_bits", "image", _set(datatype=1, bitpix=1), readable="image")
simple("datatype_too_wide", "image", _set(datatype=64, bitpix=64), readable="image")
simple("label_datatype_too_wide", "label", _set(datatype=512, bitpix=16), readable="label")
simple("bitpix_of_another_type", "image", _set(bitpix=7), severity="warning", sound_header="image")


@damage(bytes_as_declared="image")
def datatype_too_narrow(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    path = root / cases[0].images[0]
    voxels(path, lambda a: a, np.float32)
    header(path, datatype=4, bitpix=16)


@damage("warning", plausible_intensities="image")
def floats_read_as_integers(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    path = root / cases[0].images[0]
    voxels(path, lambda a: a, np.float32)
    header(path, datatype=8)


@damage("warning", neighbours_alike="image")
def byte_order_of_the_voxels(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    path = root / cases[0].images[0]
    voxels(path, lambda a: np.rint(a / max(1e-9, np.abs(a).max()) * 3000), np.int16)
    content = raw(path)
    start = int(field(path, "vox_offset"))
    content[start:] = np.frombuffer(content[start:], np.int16).byteswap().tobytes()
    store(path, content)


# Dimensions and offset
def _dim(axis: int, step: int) -> Callable[[Path], object]:
    return lambda p: header(p, **{f"dim_{axis}": field(p, "dim")[axis] + step})


simple("dim_too_large", "image", _dim(3, 2), readable="image")
simple("label_dim_too_large", "label", _dim(1, 1), readable="label")
simple("dim_too_small", "image", _dim(2, -3), bytes_as_declared="image", label_of_image_shape="label")
simple("label_dim_too_small", "label", _dim(3, -1), bytes_as_declared="label", label_of_image_shape="label")
simple("dim_negative", "image", _set(dim_2=-5), readable="image")
simple("dim_zero", "image", _set(dim_1=0), readable="image")
simple("dim_count_two", "image", _set(dim_0=2), readable="image")
simple("dim_count_nine", "image", _set(dim_0=9), readable="image")
simple("offset_too_late", "image", lambda p: header(p, vox_offset=field(p, "vox_offset") + 4000), readable="image")
simple("offset_in_the_header", "image", _set(vox_offset=100), readable="image")
simple("offset_nan", "image", _set(vox_offset=np.nan), readable="image")
simple("magic_lost", "image", _set(magic=b"abc"), readable="image")
simple("header_size_wrong", "image", _set(sizeof_hdr=340), readable="image")
simple("header_of_noughts", "image", lambda p: store(p, bytes(348) + bytes(raw(p)[348:])), readable="image")

# Scaling
simple("slope_nan", "image", _set(scl_slope=np.nan), usable_header="image")
simple("slope_infinite", "image", _set(scl_slope=np.inf), usable_header="image")
simple("intercept_nan", "image", _set(scl_slope=1, scl_inter=np.nan), usable_header="image")
simple("label_slope_nan", "label", _set(scl_slope=np.nan), usable_header="label")
simple("label_slope_a_half", "label", _set(scl_slope=0.5), whole_number_labels="label")
simple("label_slope_ten", "label", _set(scl_slope=10), declared_labels="label")
