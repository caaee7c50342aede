"""What a header may say: each rule of the one table is applied by every command, and so is what the rules allow."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import polar

from distilldsm.config import EvaluateConfig
from distilldsm.core.errors import DataError
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.data.fingerprint import fingerprint_case
from distilldsm.data.targets import Targets
from distilldsm.evaluation import scoring
from distilldsm.io import read_scan
from distilldsm.io.header_rules import AFFINE_RULES, LAYOUT_RULES, MAX_SHEAR, VALUE_RULES, broken, orthogonal
from distilldsm.io.inputs import find_inputs
from distilldsm.io.orientation import spacing_of
from distilldsm.validation.case_measures import measure_case
from tests.data.volumes import affine
from tests.io.test_nifti import header_bytes, write

INDEX = DatasetIndex(
    name="one",
    channels=(Channel(name="T1", modality="MRI"),),
    labels={"background": 0, "thing": 1},
    cases=(Case(id="a", patient="a", images=("scan.nii",), label="label.nii"),),
)
CASE = INDEX.cases[0]


def predict(root: Path) -> None:
    (one,), *_ = find_inputs([root / "scan.nii"], 1)
    one.read(1)


def validate(root: Path) -> None:
    row = measure_case(root, CASE, INDEX.channels, INDEX.labels)
    details = [*row.details.get("read_error", []), *row.details.get("header_error", [])]
    assert {detail.file for detail in details} <= {"scan.nii"}
    assert bool(details) == bool(row.values["read_error"] or row.values.get("header_error"))
    if details:
        raise DataError(details[0].seen, where=root / details[0].file)


def preprocess(root: Path) -> None:
    fingerprint_case(root, CASE, INDEX)


def evaluated(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = SimpleNamespace(predict=lambda scan: SimpleNamespace(mask=np.zeros(scan.shape, np.uint8)))
    monkeypatch.setattr(scoring, "_predictor", lambda *_: predictor)
    monkeypatch.setattr(scoring, "worker_pool", lambda *_, **__: ThreadPoolExecutor(1))
    work = root / "work"
    for name in ("scores", "timing", "predictions"):
        (work / name).mkdir(parents=True)
    targets = Targets(class_names=("background", "thing"), class_values=(0, 1))
    scoring.score_all(EvaluateConfig(workers=1), [], root, work, INDEX.cases, INDEX, targets)
    assert (work / "predictions" / "a.nii.gz").exists()


def answers(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each command answers of the data set: where and what its error is, or nothing."""
    commands: dict[str, Callable[[Path], None]] = {
        "predict": predict,
        "validate": validate,
        "preprocess": preprocess,
        "evaluate": lambda root: evaluated(root, monkeypatch),
    }
    found = {}
    for name, command in commands.items():
        try:
            command(root)
            found[name] = ""
        except DataError as error:
            found[name] = f"{error.where}: {error.problem.split(' (')[0]}"
    return found


def pair(root: Path, data: np.ndarray | None = None, matrix: np.ndarray | None = None) -> Path:
    """A scan and its label in NIfTI-1."""
    data = np.arange(120, dtype=np.int16).reshape(4, 5, 6) if data is None else data
    label = np.zeros((4, 5, 6), np.uint8)
    label[1:3, 2, 3] = 1
    write(root / "label.nii", label, affine() if matrix is None else matrix)
    return write(root / "scan.nii", data, affine() if matrix is None else matrix)


REFUSED = [
    ("shape", {"dim": [3, 4, 5, 0, 1, 1, 1, 1]}),
    ("shape", {"dim": [3, 4, -5, 6, 1, 1, 1, 1]}),
    ("three_dimensional", {"dim": [2, 4, 5, 6, 1, 1, 1, 1]}),
    ("three_dimensional", {"dim": [5, 4, 5, 2, 1, 3, 1, 1]}),
    ("number_type", {"datatype": 128, "bitpix": 24}),
    ("number_type", {"datatype": 32, "bitpix": 64}),
    ("number_type", {"datatype": 77}),
    ("voxel_offset", {"vox_offset": 348}),
    ("voxel_offset", {"vox_offset": 352.5}),
    ("voxel_offset", {"vox_offset": np.nan}),
    ("voxel_size", {"pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}),
    ("voxel_size", {"pixdim": [1, 1, -1, 1, 0, 0, 0, 0]}),
    ("voxel_size", {"pixdim": [1, 1, 1, np.nan, 0, 0, 0, 0]}),
    ("scaling", {"scl_slope": np.inf}),
    ("scaling", {"scl_slope": np.nan}),
    ("scaling", {"scl_slope": 1, "scl_inter": np.nan}),
    ("scaling", {"scl_slope": 2, "scl_inter": -np.inf}),
    ("length_unit", {"xyzt_units": 6}),
    ("geometry", {"srow_x": [np.nan, 0, 0, 0]}),
    ("geometry", {"srow_x": [0, 0, 0, 0], "srow_y": [0, 0, 0, 0]}),
    ("geometry", {"srow_x": [501, 0, 0, 0]}),
    ("geometry", {"srow_x": [0.004, 0, 0, 0]}),
    ("geometry", {"sform_code": 0, "qform_code": 1, "quatern_b": 0.9, "quatern_c": 0.9}),
    ("geometry", {"xyzt_units": 1}),
    ("right_angles", {"srow_x": [1, 0.3, 0, 0]}),
    ("right_angles", {"srow_x": [1, 0, 1.1 * MAX_SHEAR, 0]}),
]
RULES = {rule.name: rule for rule in (*LAYOUT_RULES, *VALUE_RULES, *AFFINE_RULES)}


def test_every_rule_of_the_table_has_a_case():
    assert {name for name, _ in REFUSED} == set(RULES)


@pytest.mark.parametrize(("name", "fields"), REFUSED)
def test_every_command_refuses_what_breaks_a_rule(tmp_path, monkeypatch, name, fields):
    header_bytes(pair(tmp_path), **fields)
    assert set(answers(tmp_path, monkeypatch).values()) == {f"{tmp_path / 'scan.nii'}: {RULES[name].problem}"}
    with pytest.raises(DataError) as caught:
        read_scan([tmp_path / "scan.nii"], 1)
    assert caught.value.seen is not None
    assert (caught.value.rule, caught.value.hint) == (RULES[name].rule, RULES[name].hint)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "is truncated or damaged"),
        ({"dim": [3, 4, 5, 7, 1, 1, 1, 1]}, "is truncated or damaged"),
        ({"dim": [4, 4, 5, 3, 2, 1, 1, 1]}, "has the wrong number of channels"),
        ({"vox_offset": 353}, "is truncated or damaged"),
        ({"magic": b"ni1"}, "is not a readable NIfTI file"),
        ({"sizeof_hdr": 349}, "is not a readable NIfTI file"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, fields, words):
    header_bytes(pair(tmp_path), **fields)
    with pytest.raises(DataError, match=words) as caught:
        read_scan([tmp_path / "scan.nii"], 1)
    assert (caught.value.where, caught.value.seen is None) == (str(tmp_path / "scan.nii"), False)


@pytest.mark.parametrize(
    "fields",
    [
        {"xyzt_units": 0},
        {"xyzt_units": 58},
        {"xyzt_units": 0b11000010},
        {"scl_slope": 0, "scl_inter": np.nan},
        {"scl_slope": 0, "scl_inter": 5},
        {"scl_slope": 0, "scl_inter": -np.inf},
        {"dim": [5, 4, 5, 6, 1, 1, 1, 1]},
        {"dim": [7, 4, 5, 6, 1, 1, 1, 1]},
        {"sform_code": 0, "qform_code": 0},
        {"sform_code": 77},
    ],
)
def test_every_command_reads_what_the_rules_allow(tmp_path, monkeypatch, fields):
    for path in (pair(tmp_path), tmp_path / "label.nii"):
        header_bytes(path, **fields)
    assert set(answers(tmp_path, monkeypatch).values()) == {""}
    scan = read_scan([tmp_path / "scan.nii"], 1)
    np.testing.assert_array_equal(scan.intensities()[0].ravel(), np.arange(120), "stored values, unscaled")
    np.testing.assert_array_equal(scan.affine, nib.load(tmp_path / "scan.nii").affine)


def test_a_small_shear_is_made_orthogonal_by_every_command(tmp_path, monkeypatch):
    matrix = affine("RAS", (2, 1, 3))
    matrix[0, 1] = 0.9 * MAX_SHEAR
    pair(tmp_path, matrix=matrix)
    assert set(answers(tmp_path, monkeypatch).values()) == {""}
    scan = read_scan([tmp_path / "scan.nii"], 1)
    axes = scan.affine[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag(np.square(spacing_of(matrix))), atol=1e-9)
    np.testing.assert_array_equal(scan.affine[:, 3], matrix[:, 3])
    mask = nib.load(tmp_path / "work" / "predictions" / "a.nii.gz")
    np.testing.assert_array_equal(mask.affine, nib.load(tmp_path / "scan.nii").affine, "the mask lies as the scan does")


@settings(deadline=None, max_examples=50)
@given(
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3),
    shears=st.tuples(*[st.floats(-0.015, 0.015)] * 3),
)
def test_orthogonal_is_the_nearest_rectangular_grid(angles, spacing, shears):
    turned = nib.eulerangles.euler2mat(*angles)
    skew = np.eye(3)
    skew[np.triu_indices(3, 1)] = shears
    matrix = nib.affines.from_matvec(turned @ skew * spacing, (3, -4, 5))
    lengths = np.array(spacing_of(matrix))
    directions = matrix[:3, :3] / lengths
    cosine = max(abs(directions[:, i] @ directions[:, j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    refused = [error.problem for error in broken(AFFINE_RULES, matrix, Path("a"))]
    assert refused == (["has sheared axes"] if cosine > MAX_SHEAR else [])
    made = orthogonal(matrix)
    rotation = made[:3, :3] / lengths
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=2e-6)
    assert np.linalg.det(rotation) == pytest.approx(np.linalg.det(turned), abs=1e-5)
    np.testing.assert_array_equal(made[:, 3], matrix[:, 3])
    np.testing.assert_allclose(rotation, polar(directions)[0], atol=2e-6)  # the nearest orthogonal matrix
    if cosine == 0:
        assert made is matrix
