"""The case table: each measure against a case built by hand, damaged files, duplicates, parallel and serial."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distilldsm.core.errors import UserError
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.io.scan import VOXEL_SHARE
from distilldsm.validation import case_table as validation
from distilldsm.validation.case_measures import measure_case, memory_bytes
from distilldsm.validation.case_table import build_case_table, table_columns
from distilldsm.validation.header_measures import BYTES_PER_VOXEL
from tests.data.volumes import affine, write_case, write_dataset
from tests.io.test_nifti import claims_much, deny, header_bytes

LABELS = {"background": 0, "shell": 1, "core": 2}
ONE = (Channel(name="T1", modality="MRI"),)


def save(path: Path, data: np.ndarray, matrix: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine() if matrix is None else matrix), path)
    return path.name


def measured(root: Path, image: np.ndarray, label: np.ndarray, matrix: np.ndarray | None = None, channels=ONE):
    case = Case(
        id="a",
        patient="p",
        images=(save(root / "i.nii.gz", image, matrix),),
        label=save(root / "l.nii.gz", label, matrix),
    )
    return measure_case(root, case, channels, LABELS)


def blocks(shape=(6, 8, 10)) -> tuple[np.ndarray, np.ndarray]:
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    label = np.zeros(shape, dtype=np.uint8)
    label[1:3, 2:4, 3:6] = 1
    label[0, 0, 0] = 2
    return image, label


def test_measures_of_a_case_built_by_hand(tmp_path):
    image, label = blocks()
    values = measured(tmp_path, image, label, affine("LPS", (0.5, 2.0, 3.0))).values
    assert values["read_error"] is None
    assert (values["case"], values["patient"], values["image"], values["label"]) == ("a", "p", "i.nii.gz", "l.nii.gz")
    assert [values[f"shape_{a}"] for a in "xyz"] == [6, 8, 10]
    assert [values[f"spacing_{a}_mm"] for a in "xyz"] == [0.5, 2.0, 3.0]
    assert (values["spacing_min_mm"], values["spacing_max_mm"], values["anisotropy"]) == (0.5, 3.0, 6.0)
    assert (values["orientation"], values["dtype"], values["label_dtype"]) == ("LPS", "float32", "uint8")
    assert values["voxel_volume_mm3"] == pytest.approx(3.0)
    assert values["volume_ml[shell]"] == pytest.approx(12 * 3.0 / 1000)
    assert values["volume_ml[core]"] == pytest.approx(3.0 / 1000)
    assert values["foreground_fraction"] == pytest.approx(13 / 480)
    assert values["border_fraction"] == pytest.approx(1 / 13)
    assert (values["label_values"], values.get("undeclared_values"), values.get("absent_labels")) == (
        "0 1 2",
        None,
        None,
    )
    nonzero = image[image != 0]
    for name, q in (("p0_5", 0.5), ("p50", 50), ("p99_5", 99.5)):
        expected = pytest.approx(np.percentile(nonzero, q))
        assert values[f"intensity_{name}_min"] == values[f"intensity_{name}_max"] == expected
        assert values[f"intensity_{name}[T1]"] == expected
    assert (values["finite_fraction"], values["constant_channels"], values["channel_difference"]) == (1.0, 0, 0)


@pytest.mark.parametrize("codes", ["RAS", "SPL", "AIR"])
def test_shape_and_spacing_follow_the_scanner_axes(tmp_path, codes):
    extent = {"x": (4, 0.7), "y": (5, 1.1), "z": (6, 4.0)}
    axes = [{"R": "x", "L": "x", "A": "y", "P": "y", "S": "z", "I": "z"}[c] for c in codes]
    shape = tuple(extent[a][0] for a in axes)
    row = measured(tmp_path, *blocks_of(shape), affine(codes, tuple(extent[a][1] for a in axes)))
    assert row.values["orientation"] == codes
    for a, (voxels, spacing) in extent.items():
        assert row.values[f"shape_{a}"] == voxels
        assert row.values[f"spacing_{a}_mm"] == pytest.approx(spacing, abs=1e-6)


def blocks_of(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=shape).astype(np.float32), rng.integers(0, 3, shape, dtype=np.uint8)


def test_one_4d_file_measures_like_a_file_per_channel(tmp_path):
    rng = np.random.default_rng(1)
    stack = rng.normal(100, 10, (5, 6, 7, 2)).astype(np.float32)
    label = save(tmp_path / "l.nii.gz", rng.integers(0, 3, (5, 6, 7), dtype=np.uint8))
    whole = (save(tmp_path / "both.nii.gz", stack),)
    single = tuple(save(tmp_path / f"{k}.nii.gz", stack[..., k]) for k in range(2))
    channels = (Channel(name="T1", modality="MRI"), Channel(name="T2", modality="MRI"))
    a, b = (
        measure_case(tmp_path, Case(id="a", patient="a", images=files, label=label), channels, LABELS).values
        for files in (whole, single)
    )
    assert a["channel_count"] == b["channel_count"] == 2
    differ = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
    assert differ == {"image"}
    assert a["intensity_p50[T2]"] == pytest.approx(np.median(stack[..., 1]))


def test_image_hash_ignores_geometry_and_storage_but_not_voxels(tmp_path):
    image = np.random.default_rng(2).integers(0, 1000, (6, 7, 8)).astype(np.int16)
    label = np.zeros((6, 7, 8), dtype=np.uint8)
    first = measured(tmp_path, image, label).values["image_sha256"]
    assert measured(tmp_path, image.astype(np.float64), label, affine("LPI", (2, 2, 2))).values["image_sha256"] == first
    image[3, 3, 3] += 1
    assert measured(tmp_path, image, label).values["image_sha256"] != first


def test_all_broken_rules_of_all_headers_are_collected_and_voxels_are_measured_none_the_less(tmp_path):
    image, label = blocks()
    for name in ("a.nii", "b.nii"):
        save(tmp_path / name, image)
        header_bytes(tmp_path / name, pixdim=[1, 0, 1, 1, 0, 0, 0, 0], scl_slope=np.nan, srow_x=[np.inf, 0, 0, 0])
    save(tmp_path / "l.nii", label)
    header_bytes(tmp_path / "l.nii", srow_x=[1, 0.3, 0, 0])
    two = (*ONE, Channel(name="T2", modality="MRI"))
    row = measure_case(tmp_path, Case(id="a", patient="a", images=("a.nii", "b.nii"), label="l.nii"), two, LABELS)
    found = [(detail.file, detail.seen.split(" (")[0]) for detail in row.details["header_error"]]
    of_image = ["has an impossible voxel size", "has an impossible scaling", "has an impossible geometry"]
    assert found == [(n, p) for n in ("a.nii", "b.nii") for p in of_image] + [("l.nii", "has sheared axes")]
    seen = row.details["header_error"][0].seen
    assert "(pixdim [0.0, 1.0, 1.0]); rule: three numbers above 0 (mm); write the voxel size" in seen
    assert row.values["header_error"].count("impossible voxel size") == 2
    assert row.values["read_error"] is None
    assert row.values["intensity_p50_max"] == np.percentile(image[image != 0], 50), "the scaling is left out"
    assert row.values["label_values"] == "0 1 2"
    assert "orientation" not in row.values


def test_two_geometries_of_one_header(tmp_path):
    image, label = blocks()
    nifti = nib.Nifti1Image(image, affine())
    moved = affine().copy()
    moved[0, 3] += 4
    nifti.set_qform(moved, code=1)
    nifti.set_sform(affine(), code=1)
    nib.save(nifti, tmp_path / "q.nii")
    save(tmp_path / "l.nii", label)
    case = Case(id="a", patient="a", images=("q.nii",), label="l.nii")
    values = measure_case(tmp_path, case, ONE, LABELS).values
    assert values["qform_sform_mm"] == pytest.approx(4, abs=1e-4)
    assert values["pixdim_affine_difference"] == 0
    header_bytes(tmp_path / "q.nii", pixdim=[1, 1, 4, 1, 0, 0, 0, 0])
    assert measure_case(tmp_path, case, ONE, LABELS).values["pixdim_affine_difference"] == 0.75


def test_units_channels_and_padding(tmp_path):
    image, label = blocks()
    nifti = nib.Nifti1Image(np.where(image < 200, -3.5, image).astype(np.float32), affine())
    nifti.header.set_xyzt_units("meter")
    nifti.header["srow_x"] /= 1000
    nib.save(nifti, tmp_path / "m.nii.gz")
    save(tmp_path / "small.nii.gz", image[:-1])
    save(tmp_path / "rgb.nii.gz", np.zeros((6, 8, 10), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))
    save(tmp_path / "l.nii.gz", label)
    channels = tuple(Channel(name=n, modality="MRI") for n in ("A", "B", "C"))
    case = Case(id="a", patient="a", images=("m.nii.gz", "small.nii.gz", "rgb.nii.gz"), label="l.nii.gz")
    row = measure_case(tmp_path, case, channels, LABELS)
    assert row.values["spatial_unit"] == "meter"
    assert row.values["channel_shapes_agree"] == 0
    assert [d.file for d in row.details["channel_shapes_agree"]] == ["small.nii.gz"]
    assert [d.file for d in row.details["read_error"]] == ["rgb.nii.gz"]
    assert "unsupported number type" in row.values["read_error"]
    assert row.values["padding_fraction"] == pytest.approx(200 / 480)
    (told,) = row.details["padding_fraction"]
    assert (told.file, told.seen) == ("m.nii.gz", "42% of the voxels are -3.5")
    plain = measured(tmp_path / "plain", image, label)  # the corner is 0
    assert (plain.values["padding_fraction"], "padding_fraction" in plain.details) == (0.0, False)
    ct = measure_case(
        tmp_path,
        Case(id="a", patient="a", images=("m.nii.gz",), label="l.nii.gz"),
        (Channel(name="CT", modality="CT"),),
        LABELS,
    )
    assert "padding_fraction" not in ct.values


def test_labels_out_of_range_are_counted(tmp_path):
    image, label = blocks()
    odd = label.astype(np.int32)
    odd[5, 5, 5], odd[4, 4, 4] = -1, 3000
    values = measured(tmp_path, image, odd).values
    assert (values["label_values"], values["undeclared_values"]) == ("-1 0 1 2 3000", "-1 3000")
    fractional = label.astype(np.float32)
    fractional[5, 5, 5] = 0.4
    row = measured(tmp_path, image, fractional)
    assert row.values["label_deviation"] == pytest.approx(0.4)
    assert "0.4" in row.details["label_deviation"][0].seen
    assert row.values.get("undeclared_values") is None


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_header_says_nothing_is_raised(tmp_path, data):
    image, label = blocks()
    save(tmp_path / "l.nii", label)
    save(tmp_path / "i.nii", image)
    name = data.draw(st.sampled_from(["i.nii", "l.nii"]))
    raw = bytearray((tmp_path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, 351))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(raw[: data.draw(st.sampled_from([len(raw), 1000, 100, 0]))])
    row = measure_case(tmp_path, Case(id="a", patient="a", images=("i.nii",), label="l.nii"), ONE, LABELS)
    for value in row.values.values():
        assert not isinstance(value, float) or np.isfinite(value)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 20), min_size=2, max_size=2), spacing=st.floats(0.1, 5))
def test_label_volumes(tmp_path, counts, spacing):
    label = np.zeros(60, dtype=np.uint8)
    label[: counts[0]], label[60 - counts[1] :] = 1, 2
    image = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    values = measured(tmp_path, image, label.reshape(3, 4, 5), affine("RAS", (spacing, 1, 1))).values
    for name, count in zip(("shell", "core"), counts, strict=True):
        assert values[f"volume_ml[{name}]"] == pytest.approx(count * spacing / 1000, rel=1e-5)
        assert (name in (values["absent_labels"] or "")) == (count == 0)
    assert values["foreground_fraction"] == pytest.approx(sum(counts) / 60)


def test_a_file_that_the_system_refuses_is_not_called_damaged(tmp_path, monkeypatch):
    image, label = blocks()
    measured(tmp_path, image, label)
    deny(monkeypatch, tmp_path / "l.nii.gz", PermissionError, errno.EACCES)
    row = measure_case(tmp_path, Case(id="a", patient="a", images=("i.nii.gz",), label="l.nii.gz"), ONE, LABELS)
    told = "cannot be read (PermissionError: [Errno 13] Permission denied"
    assert row.values["read_error"].startswith(f"l.nii.gz: {told}")


def duplicated(root: Path) -> DatasetIndex:
    """Patients p (a, b: same image), q (c: the image of a; d: a constant image), r (e: constant too, label of c)."""
    cases = {k: write_case(root, k, seed=n) for n, k in enumerate("abcde")}
    for copy in "bc":
        shutil.copy(root / cases["a"].images[0], root / cases[copy].images[0])
    for constant in "de":
        save(root / cases[constant].images[0], np.full((12, 20, 18), 7, np.float32))
    shutil.copy(root / cases["c"].label, root / cases["e"].label)
    patients = dict(zip("abcde", "ppqqr", strict=True))
    return DatasetIndex(
        name="copies",
        channels=ONE,
        labels=LABELS,
        cases=tuple(Case(id=k, patient=patients[k], images=case.images, label=case.label) for k, case in cases.items()),
    )


def test_copies_are_found_within_and_across_patients(tmp_path):
    table = build_case_table(tmp_path, duplicated(tmp_path), workers=1)
    found = {
        column: {case: row.values[column] for case, row in table.by_case.items() if row.values.get(column)}
        for column in ("same_image_other_patient", "same_image_same_patient", "same_label_as")
    }
    assert found["same_image_other_patient"] == {"a": "c", "b": "c", "c": "a, b"}
    assert found["same_image_same_patient"] == {"a": "b", "b": "a"}
    assert found["same_label_as"] == {"c": "e", "e": "c"}
    assert "p, q" in table.details("a", "same_image_other_patient")[0].seen


def test_parallel_equals_serial_and_the_order_is_the_index(tmp_path, monkeypatch):
    index = write_dataset(tmp_path, 5, channels=2)
    (tmp_path / index.cases[2].images[1]).write_bytes(b"no volume")
    serial = build_case_table(tmp_path, index, workers=1)
    monkeypatch.setattr(validation, "SERIAL_BYTES", 0)
    parallel = build_case_table(tmp_path, index, workers=2)
    assert parallel.rows == serial.rows
    assert list(serial.by_case) == [case.id for case in index.cases]
    assert "image" in serial.by_case["case_02"].values["read_error"]


def test_frame_csv_and_summary(tmp_path):
    index = write_dataset(tmp_path, 3)
    (tmp_path / index.cases[1].label).unlink()
    table = build_case_table(tmp_path, index, workers=1)
    frame = table.frame()
    assert list(frame.columns) == [c.name for c in table_columns(index)]
    assert frame["volume_ml[core]"].isna().tolist() == [False, True, False]
    assert frame["read_error"].notna().tolist() == [False, True, False]
    table.write_csv(tmp_path / "cases.csv")
    with (tmp_path / "cases.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["case"] for line in lines] == ["case_00", "case_01", "case_02"]
    assert lines[1]["volume_ml[core]"] == ""
    assert float(lines[0]["volume_ml[core]"]) == pytest.approx(frame["volume_ml[core]"][0], rel=1e-8)
    summary = table.summary()
    assert summary["shape_x"] | {"meaning": ""} == {"meaning": "", "measured": 3, "min": 10, "median": 11, "max": 12}
    assert summary["orientation"]["common"] == {"LPS": 2, "RAS": 1}
    assert summary["volume_ml[core]"]["measured"] == 2


def test_every_measured_value_has_a_column(tmp_path):
    index = write_dataset(tmp_path, 1, channels=2)
    row = build_case_table(tmp_path, index, workers=1).rows[0]
    assert set(row.values) <= {c.name for c in table_columns(index)}


def test_a_killed_worker_and_the_unforeseen(tmp_path, monkeypatch):
    index = write_dataset(tmp_path, 2)
    case = index.cases[0]

    def surprise(*_):
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patched:
        patched.setattr("distilldsm.validation.case_measures._measure_images", surprise)
        row = measure_case(tmp_path, case, ONE, LABELS)
    assert row.values["read_error"] == f"{case.images[0]}: RuntimeError: unforeseen"

    monkeypatch.setattr(validation, "SERIAL_BYTES", 0)
    monkeypatch.setattr(validation, "_measure", _die)
    with pytest.raises(UserError, match=r"validate\.workers"):
        build_case_table(tmp_path, index, workers=2)


def _die(_: object) -> None:
    os._exit(1)


def test_large_volumes_use_fewer_workers(tmp_path, monkeypatch):
    index = write_dataset(tmp_path, 3)
    monkeypatch.setattr(validation, "SERIAL_BYTES", 0)
    largest = max(memory_bytes(tmp_path, case) for case in index.cases)
    assert largest > 12 * 20 * 18 * BYTES_PER_VOXEL
    monkeypatch.setattr(validation, "budget_bytes", lambda gigabytes: (2 * largest - 1) / VOXEL_SHARE)
    monkeypatch.setattr(validation, "worker_pool", lambda *a, **k: pytest.fail("too much memory"))
    assert len(build_case_table(tmp_path, index, workers=3).rows) == 3


def test_a_file_beyond_the_memory_budget_is_refused_by_its_header(tmp_path):
    index = write_dataset(tmp_path, 3)
    claims_much(tmp_path / index.cases[1].images[0])
    table = build_case_table(tmp_path, index)
    errors = [row.values["read_error"] for row in table.rows]
    assert errors[0] is errors[2] is None
    assert errors[1].startswith(f"{index.cases[1].images[0]}: needs more memory than allowed")


def test_the_documentation_lists_every_column(repository):
    text = (repository / "docs" / "validation.md").read_text(encoding="utf-8")
    index = DatasetIndex(name="d", channels=ONE, labels=LABELS, cases=(Case(id="a", patient="a", images=(), label=""),))
    for column in table_columns(index):
        assert (
            f"`{column.name.replace('[T1]', '[CHANNEL]').replace('[shell]', '[LABEL]').replace('[core]', '[LABEL]')}`"
            in text
        )
