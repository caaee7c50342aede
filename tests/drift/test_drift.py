"""`distilldsm drift`: what is like the training data is inside, what is changed is told, and by what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.config import PreprocessConfig
from distilldsm.core.files import write_json
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.data.drift_measures import Measure, measures_of
from distilldsm.data.fingerprint import fingerprint_case
from distilldsm.data.plan import Plan, make_plan
from distilldsm.data.training_distribution import load_distribution, make_distribution
from distilldsm.drift import drift_of_files
from distilldsm.drift.compare import Reference, check_scan, check_set
from distilldsm.drift.run import TrainingCases
from distilldsm.io import read_scan
from tests.data.volumes import affine, ellipsoid

TRAINING, NEW = 24, 8


def write_scan(path: Path, seed: int) -> None:
    """A bright ellipsoid on a dim background, of the scale, size and noise of this scanner's population."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(22, 27, 3))
    label = ellipsoid(shape, np.array(shape) / 2 + rng.uniform(-1, 1, 3), np.array(shape) * rng.uniform(0.25, 0.32, 3))
    image = 40 + 80.0 * label + rng.normal(0, rng.uniform(6, 9), shape)
    matrix = affine("LPS" if seed % 2 else "RAS", (1.0, 1.0, 1.0))
    for name, data in (("images", (image * rng.uniform(0.9, 1.1)).astype(np.float32)), ("labels", label)):
        (path / name).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data.astype(data.dtype if name == "images" else np.uint8), matrix),
                 path / name / f"s{seed:03d}.nii.gz")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Plan]:
    """A folder with `model` (as far as drift reads it) and `new`: scans of the same scanner."""
    root = tmp_path_factory.mktemp("drift")
    for seed in range(TRAINING):
        write_scan(root / "train", seed)
    for seed in range(100, 100 + NEW):
        write_scan(root / "new", seed)
    names = [f"s{seed:03d}" for seed in range(TRAINING)]
    index = DatasetIndex(
        name="Blobs",
        channels=(Channel(name="T1", modality="MRI"),),
        labels={"background": 0, "blob": 1},
        cases=tuple(Case(id=n, patient=n, images=(f"images/{n}.nii.gz",), label=f"labels/{n}.nii.gz") for n in names),
    )
    cases = [fingerprint_case(root / "train", case, index) for case in index.cases]
    plan = make_plan(index, cases, PreprocessConfig())
    (root / "model").mkdir()
    plan.save(root / "model" / "plan.json")
    fingerprint = make_distribution("Blobs", [c.scan for c in cases], plan)
    write_json(root / "model" / "training_distribution.json", fingerprint)
    return root, plan


def report_of(made: tuple[Path, Plan], scans: Path, masks: Path | None = None) -> dict:
    return drift_of_files(made[0] / "model", [scans], masks=masks, name="blobs")


def changed(made: tuple[Path, Plan], folder: Path, change) -> Path:
    """All new scans after `change(data, affine) -> (data, affine)`."""
    for path in sorted((made[0] / "new" / "images").iterdir()):
        image = nib.load(path)
        data, matrix = change(np.asarray(image.dataobj), image.affine.copy())
        nib.save(nib.Nifti1Image(data.astype(np.float32), matrix), folder / path.name)
    return folder


def test_a_scan_is_compared_before_its_prediction(made, tmp_path):
    cases = TrainingCases(made[0] / "model")
    for path in sorted((made[0] / "new" / "images").iterdir())[:3]:
        assert cases.unlike(read_scan([path], 1)) == {}
    wide = changed(made, tmp_path, lambda data, matrix: (data, matrix @ np.diag([1, 1, 3, 1])))
    found = cases.unlike(read_scan([next(iter(wide.iterdir()))], 1))
    assert found["voxel size along z (mm)"]["value"] == 3
    assert found["voxel size along z (mm)"]["low"] < 1 < found["voxel size along z (mm)"]["high"] < 3


def test_scans_of_the_same_scanner_are_inside(made):
    report = report_of(made, made[0] / "new" / "images", made[0] / "new" / "labels")
    assert [row["outside"] for row in report["scans"]] == [[]] * NEW
    assert report["together"] == []
    assert report["drift"] is False
    assert {"volume_ml[blob]", "contrast[blob,T1]"} <= report["scans"][0]["values"].keys()


def _half(data, matrix):
    return data[:, :, : data.shape[2] // 2], matrix


CHANGES = {
    "scale": (lambda d, m: (2 * d, m), "p50[T1]", False),
    "spacing": (lambda d, m: (d, m @ np.diag([1, 2.0, 1, 1])), "spacing_y_mm", True),
    "crop": (_half, "fov_z_mm", True),
    "inverted": (lambda d, m: (d.max() + d.min() - d, m), "centre[T1]", True),
    "noise": (lambda d, m: (d + np.random.default_rng(0).normal(0, 30, d.shape), m), "roughness[T1]", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_is_told(made, tmp_path, name):
    change, measure, is_drift = CHANGES[name]
    report = report_of(made, changed(made, tmp_path, change))
    assert all(measure in {o["measure"] for o in row["outside"]} for row in report["scans"])
    assert measure in {f["measure"] for f in report["together"]}
    # The z-score undoes another scale of the intensities: it is told, but no drift.
    assert report["drift"] is is_drift
    assert all(
        o["undone"] is not is_drift for row in report["scans"] for o in row["outside"] if o["measure"] == measure
    )


def test_a_scan_measures_as_its_training_case_did(made):
    root, plan = made
    index_row = report_of(made, root / "train" / "images", root / "train" / "labels")["scans"]
    kept = load_distribution(root / "model").measures
    for name in measures_of(plan):
        assert sorted(row["values"][name.name] for row in index_row) == pytest.approx(kept[name.name], rel=1e-4), name


def test_orientation_does_not_matter(made, tmp_path):
    source = made[0] / "new" / "images" / "s100.nii.gz"
    image = nib.load(source)
    nib.save(image.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])), tmp_path / "turned.nii.gz")
    nib.save(image, tmp_path / "stored.nii.gz")
    one, two = report_of(made, tmp_path)["scans"]
    assert one["orientation"] != two["orientation"]
    assert one["values"] == pytest.approx(two["values"], rel=1e-4)


def test_bad_files_are_told_and_the_others_compared(made, tmp_path):
    for path in (made[0] / "new" / "images").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "s100.nii.gz").write_bytes(b"hello")
    (tmp_path / "s102.nrrd").touch()
    image = nib.load(tmp_path / "s101.nii.gz")
    image.set_qform(image.affine * [[2], [1], [1], [1]], 1)
    nib.save(image, tmp_path / "s101.nii.gz")
    report = report_of(made, tmp_path)
    assert {row["scan"]: len(row["remarks"]) for row in report["scans"]}.pop("s101") > 0
    assert [one["path"] for one in report["skipped"]] == [str(tmp_path / "s102.nrrd")]
    assert len(report["scans"]) == NEW - 1
    assert [f["scan"] for f in report["failures"]] == ["s100"]
    assert "s100.nii.gz" in report["failures"][0]["message"]


def test_the_page_needs_no_network_and_escapes(made, tmp_path):
    from distilldsm.drift.report import render

    report = report_of(made, changed(made, tmp_path, CHANGES["spacing"][0]))
    report["scans"][0]["scan"] = "<script>x</script>"
    page = render(report, load_distribution(made[0] / "model"), made[1])
    assert page.count("<script") == 1, "the frame's own"
    assert "<script>x" not in page
    assert "http" not in page
    assert page.count("<svg") == len(report["measures"])
    assert "Drift: 8 of 8 scans lie outside the 24 training cases of Blobs" in page


MEASURE = Measure(
    name="m", title="m", unit="mm", group="g", transform="linear", floor=0.1, undone=False, meaning="something"
)


def test_the_limits_and_distances_are_those_documented():
    values = [float(v) for v in range(21)]
    reference = Reference.of(MEASURE, values)
    assert (reference.low, reference.high, reference.median) == pytest.approx((-5.1, 25.1, 10))
    assert reference.distance(10 + 5 * 1.4826) == pytest.approx(1)  # the MAD of 0..20 is 5
    assert [bool(check_scan({"m": v}, {"m": reference})) for v in (25.0, 25.2, -5.0, -5.2)] == [
        False,
        True,
        False,
        True,
    ]


def test_a_set_can_differ_where_no_scan_does():
    rng = np.random.default_rng(0)
    reference = {"m": Reference.of(MEASURE, sorted(rng.normal(0, 1, 100)))}
    alike = [{"m": v} for v in rng.normal(0, 1, 20)]
    shifted = [{"m": v} for v in rng.normal(1.6, 0.3, 20)]
    assert not any(check_scan(row, reference) for row in shifted)
    assert check_set(alike, reference) == ()
    (found,) = check_set(shifted, reference)
    assert found.p < 0.01
    assert check_set(shifted[:4], reference) == ()  # too few


def test_rounding_is_no_difference():
    reference = {"m": Reference.of(MEASURE, [1.0] * 50)}
    assert check_set([{"m": 1.0 + 1e-7}] * 20, reference) == ()


def test_the_command_tells_exit_codes_and_never_loads_torch(made, tmp_path):
    code = (
        "import sys\nfrom distilldsm.cli.main import main\ncode = main(sys.argv[1:])\n"
        "print([m for m in ('torch', 'matplotlib', 'pandas', 'openvino') if m in sys.modules], code)"
    )
    broken = tmp_path / "old"
    broken.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, "drift", str(broken), str(made[0] / "new" / "images")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[] 1"
    assert "is not an exported model" in done.stderr
    assert main(["drift", str(broken), "x.nii.gz", "-o", str(tmp_path / "report.pdf")]) == 2
