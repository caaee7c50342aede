"""Stage validate on a data set in which every case is damaged in another way."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.components.validate import STAGE, run
from distilldsm.config import ValidateConfig
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json
from distilldsm.core.hashes import file_hashes
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from tests.data.volumes import write_case, write_dataset

GOOD = 4


def _edit(path: Path, change: Callable[[np.ndarray], np.ndarray | None], *, dtype=np.float32) -> None:
    image = nib.load(path)
    data = np.asarray(image.dataobj, dtype=dtype).copy()
    changed = change(data)
    nib.save(nib.Nifti1Image(data if changed is None else changed, image.affine), path)


def _set(index: tuple, value: float) -> Callable[[np.ndarray], None]:
    def change(data: np.ndarray) -> None:
        data[index] = value

    return change


def _move(path: Path, change: Callable[[np.ndarray], None]) -> None:
    image = nib.load(path)
    matrix = image.affine.copy()
    change(matrix)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), matrix), path)


def _poke(path: Path, offset: int, value: bytes) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(value)] = value
    path.write_bytes(gzip.compress(bytes(raw)))


PIXDIM_Z, SROW_X = 88, 280  # byte offsets in a NIfTI-1 header

DAMAGES: dict[str, tuple[str, str, Callable[[Path, Path], None]]] = {
    "nan": ("image", "finite_voxels", lambda i, _: _edit(i, _set((3, 4, 5), np.nan))),
    "infinite": ("image", "finite_voxels", lambda i, _: _edit(i, _set((3, 4, 5), np.inf))),
    "truncated": ("image", "readable", lambda i, _: i.write_bytes(i.read_bytes()[:-2000])),
    "truncated_label": ("label", "readable", lambda _, t: t.write_bytes(t.read_bytes()[: t.stat().st_size // 2])),
    "no_nifti": ("image", "readable", lambda i, _: i.write_bytes(b"hello")),
    "missing": ("image", "readable", lambda i, _: i.unlink()),
    "missing_label": ("label", "readable", lambda _, t: t.unlink()),
    "small_label": ("label", "label_of_image_shape", lambda _, t: _edit(t, lambda d: d[1:], dtype=np.uint8)),
    "shifted": ("label", "label_on_image_grid", lambda _, t: _move(t, _set((0, 3), 7.5))),
    "flipped": ("label", "label_on_image_grid", lambda _, t: _move(t, lambda m: np.negative(m[0], out=m[0]))),
    "undeclared": ("label", "declared_labels", lambda _, t: _edit(t, _set((3, 4, 5), 7), dtype=np.uint8)),
    "negative": ("label", "declared_labels", lambda _, t: _edit(t, _set((3, 4, 5), -1), dtype=np.int16)),
    "fraction": ("label", "whole_number_labels", lambda _, t: _edit(t, _set((3, 4, 5), 1.3))),
    "nan_label": ("label", "finite_label", lambda _, t: _edit(t, _set((3, 4, 5), np.nan))),
    "empty": ("label", "some_foreground", lambda _, t: _edit(t, np.zeros_like, dtype=np.uint8)),
    "constant": ("image", "something_to_see", lambda i, _: _edit(i, lambda d: np.full_like(d, 5))),
    "zero_pixdim": ("image", "usable_header", lambda i, _: _poke(i, PIXDIM_Z, np.float32(0).tobytes())),
    "negative_pixdim": ("image", "usable_header", lambda i, _: _poke(i, PIXDIM_Z, np.float32(-2).tobytes())),
    "nan_affine": ("image", "usable_header", lambda i, _: _poke(i, SROW_X, np.float32(np.nan).tobytes())),
    "flat_affine": ("image", "usable_header", lambda i, _: _poke(i, SROW_X, np.zeros(12, "<f4").tobytes())),
    "channels": ("image", "declared_channels", lambda i, _: _edit(i, lambda d: np.stack([d, d + 1, d], -1))),
    "flat": ("image", "readable", lambda i, _: _edit(i, lambda d: d[:, :, 4])),
    "flat_label": ("label", "readable", lambda _, t: _edit(t, lambda d: d[:, :, 4], dtype=np.uint8)),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Path, DatasetIndex]:
    root = tmp_path_factory.mktemp("damaged")
    index = write_dataset(root, GOOD)
    cases = list(index.cases)
    for seed, (name, (_, _, damage)) in enumerate(DAMAGES.items(), start=100):
        case = write_case(root, name, seed=seed)
        damage(root / case.images[0], root / case.label)
        cases.append(case)
    for name, seed in (("leak_1", 7), ("leak_2", 7)):
        cases.append(write_case(root, name, seed=seed))
    for name in ("twin_1", "twin_2"):
        cases.append(replace(write_case(root, name, seed=8), patient="twin"))
    index = replace(index, cases=tuple(cases))
    index.save(root)
    return root, index


@pytest.fixture(scope="module")
def suite(repository) -> str:
    return str(repository / "conf" / "expectations.yaml")


@pytest.fixture(scope="module")
def excluded(damaged, suite, tmp_path_factory) -> tuple[Path, dict]:
    """The stage's output with `exclude`, and what the input was before."""
    root, _ = damaged
    before = file_hashes(root)
    out = tmp_path_factory.mktemp("out") / "validation"
    run(ValidateConfig(on_invalid="exclude", suite=suite), {"dataset": root}, {"validation": out})
    assert file_hashes(root) == before
    return out, read_json(out / "report.json")


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_found_with_file_and_rule(damaged, excluded, name):
    _, index = damaged
    kind, rule, _ = DAMAGES[name]
    case = next(c for c in index.cases if c.id == name)
    file = case.label if kind == "label" else case.images[0]
    errors = [f for f in excluded[1]["findings"] if f["case"] == name and f["severity"] == "error"]
    assert (file, rule) in [(f["file"], f["rule"]) for f in errors]
    assert all(f["seen"] and f["allowed"] and f["hint"] for f in errors)
    # Beyond the damage itself only its consequence: an image without its geometry does not fit its label.
    shape, grid = {"label_of_image_shape"}, {"label_on_image_grid"}
    consequences = {"flat": shape, "flat_label": shape, "flat_affine": grid}
    assert {f["rule"] for f in errors} - {rule} <= consequences.get(name, set())


def test_copies_across_patients_are_errors_and_within_one_warnings(excluded):
    found = {(f["case"], f["rule"], f["severity"]) for f in excluded[1]["findings"]}
    assert {("leak_1", "patient_leakage", "error"), ("leak_2", "patient_leakage", "error")} <= found
    assert {("twin_1", "image_once_per_patient", "warning"), ("twin_2", "image_once_per_patient", "warning")} <= found


def test_good_cases_are_not_flagged_and_the_counts_add_up(damaged, excluded):
    out, report = excluded
    good = [f"case_{k:02d}" for k in range(GOOD)]
    assert not [f for f in report["findings"] if f["case"] in good]
    accepted = read_json(out / "accepted.json")
    assert accepted["accepted"] == [*good, "twin_1", "twin_2"]
    assert set(accepted["excluded"]) == {*DAMAGES, "leak_1", "leak_2"}
    assert accepted["excluded"]["empty"] == ["some_foreground"]
    metrics = read_json(out / "metrics.json")
    severities = [f["severity"] for f in report["findings"]]
    assert metrics == {
        "cases": len(damaged[1].cases),
        "patients": len(damaged[1].cases) - 1,
        "accepted": GOOD + 2,
        "excluded": len(DAMAGES) + 2,
        "errors": severities.count("error"),
        "warnings": severities.count("warning"),
    }


def test_output_is_whole_and_repeatable(damaged, excluded, suite, tmp_path):
    out, _ = excluded
    assert {p.name for p in out.iterdir()} == {*STAGE.output.parts, "metrics.json"}, "what dvc.yaml lists"
    names = {*STAGE.output.parts, "metrics.json", "data_docs/index.html", "data_docs/suite.html"} - {"data_docs"}
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == names
    assert set(read_json(out / "manifest.json")["files"]) == names - {"manifest.json"}
    again = tmp_path / "validation"
    run(ValidateConfig(on_invalid="exclude", suite=suite), {"dataset": damaged[0]}, {"validation": again})
    for name in names - {"manifest.json"}:
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    html = (out / "report.html").read_text()
    assert all(name in html for name in DAMAGES)


def test_fail_refuses_keeps_the_report_and_the_old_output(damaged, suite, tmp_path):
    root, _ = damaged
    before = file_hashes(root)
    out = tmp_path / "validation"
    out.mkdir()
    (out / "accepted.json").write_text("old")
    with pytest.raises(DataError) as caught:
        run(ValidateConfig(suite=suite), {"dataset": root}, {"validation": out})
    failed = tmp_path / "validation-failed"
    report = json.loads((failed / "report.json").read_text())
    message = str(caught.value)
    assert f"{report['counts']['errors']} errors" in message
    assert str(failed / "report.html") in message
    assert "validate.on_invalid: exclude" in message
    for finding in report["findings"][:10]:
        assert str(root / finding["file"]) in message
        assert finding["rule"] in message
        assert finding["seen"] in message
        assert finding["hint"] in message
    assert message.count("\n      hint: ") == 10
    assert f"and {report['counts']['errors'] - 10} more" in message
    assert [p.name for p in out.iterdir()] == ["accepted.json"]
    assert (out / "accepted.json").read_text() == "old"
    assert file_hashes(root) == before
    # Once the data is fixed, the report of the failure goes.
    fixed = tmp_path / "fixed"
    write_dataset(fixed, 3)
    run(ValidateConfig(suite=suite), {"dataset": fixed}, {"validation": out})
    assert not failed.exists()
    assert read_json(out / "accepted.json")["accepted"] == ["case_00", "case_01", "case_02"]


def test_a_foreign_directory_of_the_same_name_is_left_alone(suite, tmp_path):
    write_dataset(tmp_path / "raw", 2)
    mine = tmp_path / "validation-failed"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    run(ValidateConfig(suite=suite), {"dataset": tmp_path / "raw"}, {"validation": tmp_path / "validation"})
    assert (mine / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("on_invalid", ["exclude", "fail"])
def test_fewer_than_two_patients_cannot_be_split(suite, tmp_path, on_invalid):
    root = tmp_path / "raw"
    index = write_dataset(root, 3)
    cases = tuple(replace(c, patient="one") for c in index.cases)
    replace(index, cases=cases).save(root)
    with pytest.raises(DataError, match="at least 2"):
        run(ValidateConfig(suite=suite, on_invalid=on_invalid), {"dataset": root}, {"validation": tmp_path / "v"})
    assert not (tmp_path / "v").exists()


def test_nothing_left_and_rules_for_the_whole_data_set(suite, tmp_path):
    root = tmp_path / "raw"
    index = write_dataset(root, 2)
    config = ValidateConfig(suite=suite, on_invalid="exclude", bounds={"spacing_max_mm": (None, 0.5)})
    with pytest.raises(DataError, match="0 patients left after 2 errors"):
        run(config, {"dataset": root}, {"validation": tmp_path / "v"})
    own = tmp_path / "own.yaml"
    own.write_text(
        "schema_version: 1\nrules:\n- {rule: many, expectation: expect_table_row_count_to_be_between, "
        "kwargs: {min_value: 9}, severity: error, message: too few cases, hint: scan more}\n"
    )
    with pytest.raises(DataError, match="whole data set") as caught:
        run(ValidateConfig(suite=str(own), on_invalid="exclude"), {"dataset": root}, {"validation": tmp_path / "v"})
    assert "too few cases" in str(caught.value)
    assert [c.id for c in index.cases] == ["case_00", "case_01"]


def test_a_wrong_suite_stops_before_any_volume_is_read(suite, tmp_path, monkeypatch):
    write_dataset(tmp_path / "raw", 2)
    monkeypatch.setattr(
        "distilldsm.validation.case_table.build_case_table", lambda *a, **k: pytest.fail("volumes were read")
    )
    config = ValidateConfig(suite=suite, bounds={"spacing": (0.0, 1.0)})
    with pytest.raises(ConfigError, match="unknown column"):
        run(config, {"dataset": tmp_path / "raw"}, {"validation": tmp_path / "v"})


def test_command_line(suite, tmp_path, capsys):
    root = tmp_path / "raw"
    index = write_dataset(root, 3)
    params = tmp_path / "params.yaml"
    params.write_text(f"validate: {{suite: '{suite}', workers: 1}}\n")
    arguments = ["--params", str(params), "--dataset", str(root), "--output", str(tmp_path / "v")]
    assert main(["validate", *arguments]) == 0
    assert "3 of 3 cases accepted, 0 errors, 0 warnings" in capsys.readouterr().out
    (root / index.cases[0].label).unlink()
    assert main(["validate", *arguments]) == 1
    error = capsys.readouterr().err
    assert "file not found" in error
    assert index.cases[0].label in error
    params.write_text("validate: {suit: x}\n")
    assert main(["validate", *arguments]) == 2
    assert "did you mean 'suite'" in capsys.readouterr().err


def _real(archive: Path, root: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Unpack the wanted files of an archive; returns their paths relative to `root`."""
    with tarfile.open(archive) as opened:
        members = [m for m in opened.getmembers() if m.isfile() and wanted(m.name)]
        opened.extractall(root, members, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*.nii.gz"))


def _validated(root: Path, index: DatasetIndex, suite: str) -> list[dict]:
    index.save(root)
    run(ValidateConfig(suite=suite, on_invalid="exclude"), {"dataset": root}, {"validation": root.parent / "v"})
    return read_json(root.parent / "v" / "report.json")["findings"]


def test_real_hippocampus_has_no_finding(hippocampus_archive, suite, tmp_path):
    files = _real(hippocampus_archive, tmp_path / "raw", lambda n: n.split("_")[-1].startswith(("00", "01")))
    images = [f for f in files if "imagesTr" in f]
    assert len(images) > 8
    index = DatasetIndex(
        name="Hippocampus",
        channels=(Channel(name="MRI", modality="MRI"),),
        labels={"background": 0, "Anterior": 1, "Posterior": 2},
        cases=tuple(
            Case(id=Path(f).name, patient=f, images=(f,), label=f.replace("imagesTr", "labelsTr")) for f in images
        ),
    )
    assert _validated(tmp_path / "raw", index, suite) == []


def test_real_acdc_holds_one_patient_twice(acdc_archive, suite, tmp_path):
    """Patients 074 and 076 have byte-identical images and different labels in this copy of the data set."""
    patients = ("patient001", "patient002", "patient074", "patient076")
    files = _real(acdc_archive, tmp_path / "raw", lambda n: any(p in n for p in patients))
    images = [f for f in files if "imagesTr" in f]
    assert len(images) == 8
    index = DatasetIndex(
        name="ACDC",
        channels=(Channel(name="cineMRI", modality="MRI"),),
        labels={"background": 0, "RV": 1, "MYO": 2, "LV": 3},
        cases=tuple(
            Case(
                id=Path(f).name,
                patient=Path(f).name[:10],
                images=(f,),
                label=f.replace("imagesTr", "labelsTr").replace("_0000", ""),
            )
            for f in images
        ),
    )
    found = _validated(tmp_path / "raw", index, suite)
    assert {f["rule"] for f in found} == {"patient_leakage"}
    assert sorted(f["case"][:10] for f in found) == ["patient074"] * 2 + ["patient076"] * 2


def test_real_brats_background_is_told(brats2015_archive, suite, tmp_path):
    """Float labels and two channels are fine; the background, normalised along with the brain, is worth a warning."""
    files = _real(brats2015_archive, tmp_path / "raw", lambda n: "/train/" in n and "mask" not in n)
    folders = sorted({Path(f).parent for f in files})
    assert len(folders) == 2
    names = ("Flair", "T1c")
    index = DatasetIndex(
        name="BraTS2015",
        channels=tuple(Channel(name=n, modality="MRI") for n in names),
        labels={"background": 0, "necrosis": 1, "oedema": 2, "solid": 3, "enhancing": 4},
        cases=tuple(
            Case(
                id=d.name,
                patient=d.name,
                images=tuple((d / f"{n}_subtrMeanDivStd.nii.gz").as_posix() for n in names),
                label=(d / "OTMultiClass.nii.gz").as_posix(),
            )
            for d in folders
        ),
    )
    found = _validated(tmp_path / "raw", index, suite)
    assert {(f["rule"], f["severity"]) for f in found} == {("background_is_zero", "warning")}
    assert len(found) == 4
