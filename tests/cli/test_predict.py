"""`distilldsm predict` as a shell sees it: inputs, outputs, reports, and what it refuses."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.data.plan import Plan
from distilldsm.inference.loading import load_trained
from distilldsm.io import read_scan
from tests.cli.predicting import files, predict, single_channel, write_scan
from tests.data.volumes import affine
from tests.export.fake import Exported, exported


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory)


@pytest.fixture
def scan(tmp_path) -> list[Path]:
    return write_scan(tmp_path, ("T0.nii.gz", "T1.nii.gz"))


@pytest.fixture(scope="module")
def single(made, tmp_path_factory) -> Path:
    return single_channel(made.export, tmp_path_factory.mktemp("single") / "model")


@pytest.mark.parametrize("engine", ["openvino", "onnx", "torch"])
def test_predict_writes_the_networks_mask_on_the_scans_grid(made, scan, tmp_path, capsys, engine):
    before = [path.read_bytes() for path in scan]
    assert predict(made.export, scan, tmp_path / "mask.nii.gz", "--engine", engine) == 0
    captured = capsys.readouterr()
    assert "shell" in captured.out
    assert "of 3.0 GB, in one piece" in captured.err
    image, mask = nib.load(scan[0]), nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == image.shape
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert mask.get_data_dtype() == np.uint8
    assert [path.read_bytes() for path in scan] == before
    found = np.asarray(mask.dataobj)
    expected = load_trained(made.model, device="cpu").predict(read_scan(scan, 2)).mask
    assert len(np.unique(expected)) > 1, "a mask of one label would make any comparison pass"
    assert (found != expected).mean() < (1e-3 if engine != "torch" else 1e-12)


def test_4d_files_and_the_json_report(made, scan, tmp_path, capsys):
    images = [nib.load(path) for path in scan]
    stacked = np.stack([image.get_fdata(dtype=np.float32) for image in images], axis=-1)
    nib.save(nib.Nifti1Image(stacked, images[0].affine), tmp_path / "both.nii")
    assert predict(made.export, scan, tmp_path / "a.nii") == 0
    capsys.readouterr()
    assert predict(made.export, [tmp_path / "both.nii"], tmp_path / "b.nii", "--json") == 0
    a, b = (np.asarray(nib.load(tmp_path / name).dataobj) for name in ("a.nii", "b.nii"))
    np.testing.assert_array_equal(a, b)
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == []
    (facts,) = report["scans"]
    assert facts["shape"] == [23, 31, 9]
    np.testing.assert_allclose(facts["spacing_mm"], [0.8, 0.9, 3.0], rtol=1e-5)
    voxel_ml = 0.8 * 0.9 * 3.0 / 1000
    assert facts["volume_ml"]["core"] == pytest.approx((b == 2).sum() * voxel_ml, abs=1e-3)
    assert set(facts["seconds"]) == {"read", "preprocess", "network", "restore", "write"}
    assert facts["peak_memory_mb"] > 50
    assert (facts["exact"], facts["pieces"]) == (True, 1)


def test_a_folder_names_its_masks_and_goes_on_after_failures(made, tmp_path, capsys):
    folder = tmp_path / "scans"
    for k, case in enumerate(("anna", "bob", "carl", "dora")):
        write_scan(folder, (f"{case}_0000.nii.gz", f"{case}_0001.nii.gz"), seed=k)
    broken = folder / "bob_0001.nii.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    (folder / "carl_0001.nii.gz").unlink()
    (folder / "readme.txt").write_text("not a scan")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    out = tmp_path / "masks"
    volumes = tmp_path / "volumes.csv"
    assert predict(made.export, [folder], out, "--json", "--volumes", str(volumes)) == 1
    captured = capsys.readouterr()
    assert files(out) == {"anna.nii.gz", "dora.nii.gz"}
    report = json.loads(captured.out)
    assert [row["scan"] for row in report["scans"]] == ["anna", "dora"]
    assert {row["scan"]: row["where"] for row in report["failures"]} == {
        "bob": str(broken),
        "carl": str(folder / "carl_0000.nii.gz"),
    }
    assert "2 of 4 scans could not be predicted" in captured.err
    assert "seen: bob, carl" in captured.err
    with open(volumes, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["scan"], row["label"]) for row in rows] == [
        (scan, label) for scan in ("anna", "dora") for label in ("shell", "core")
    ]
    assert float(rows[0]["volume_ml"]) == pytest.approx(report["scans"][0]["volume_ml"]["shell"], rel=1e-3, abs=1e-4)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_several_files_of_one_channel_are_several_scans(single, tmp_path, capsys):
    paths = write_scan(tmp_path / "in", ("a.nii.gz", "b.nii"))
    out = tmp_path / "out"
    assert predict(single, paths, out, "--volumes", str(tmp_path / "volumes.json")) == 0
    assert files(out) == {"a.nii.gz", "b.nii.gz"}
    assert set(json.loads((tmp_path / "volumes.json").read_text())) == {"a", "b"}
    (out / "folder").mkdir()
    other = write_scan(tmp_path / "other", ("a.nii",))
    assert predict(single, [*paths, *other], out) == 2
    assert "two scans are called 'a'" in capsys.readouterr().err
    assert predict(single, paths, tmp_path / "volumes.json") == 2
    assert "is not a directory" in capsys.readouterr().err
    # nnU-Net's name of a single channel.
    write_scan(tmp_path / "nnunet", ("case_0000.nii.gz",))
    assert predict(single, [tmp_path / "nnunet"], tmp_path / "n") == 0
    assert files(tmp_path / "n") == {"case.nii.gz"}


def test_one_slice_and_a_volume_smaller_than_the_stride(single, tmp_path):
    for shape in ((20, 18, 1), (3, 2, 4), (1, 1, 1)):
        paths = write_scan(tmp_path, ("s.nii",), shape=shape)
        assert predict(single, paths, tmp_path / "mask.nii.gz", "--probabilities") == 0
        assert nib.load(tmp_path / "mask.nii.gz").shape == shape
        assert nib.load(tmp_path / "mask_probabilities.nii.gz").shape == (*shape, 3)


def test_probabilities_lie_beside_the_mask_and_agree_with_it(made, scan, tmp_path):
    assert predict(made.export, scan, tmp_path / "mask.nii.gz", "--probabilities") == 0
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    maps = nib.load(tmp_path / "mask_probabilities.nii.gz")
    assert maps.get_data_dtype() == np.uint8
    p = maps.get_fdata()
    np.testing.assert_allclose(p.sum(axis=-1), 1, atol=0.01)
    plan = Plan.load(made.export / "plan.json")
    chosen = np.take_along_axis(p, np.searchsorted(plan.class_values, mask)[..., None], axis=-1)[..., 0]
    assert (chosen >= p.max(axis=-1) - 1e-9).all()
    assert files(tmp_path) == {"T0.nii.gz", "T1.nii.gz", "mask.nii.gz", "mask_probabilities.nii.gz"}


@pytest.mark.slow
def test_the_budget_is_kept_or_refused(made, tmp_path, capsys):
    scan = write_scan(tmp_path, ("a.nii", "b.nii"), shape=(46, 160, 180))
    assert predict(made.export, scan, tmp_path / "whole.nii", "--json") == 0
    assert json.loads(capsys.readouterr().out)["scans"][0]["pieces"] == 1
    reports = {}
    for name, gigabytes in (("pieces", "0.64"), ("tiles", "0.55")):
        assert predict(made.export, scan, tmp_path / f"{name}.nii", "--json", "--max-memory", gigabytes) == 0
        captured = capsys.readouterr()
        reports[name] = json.loads(captured.out)["scans"][0]
        assert ("GB, streamed, " in captured.err) == (name == "pieces")
        assert ("tiles of" in captured.err) == (name == "tiles")
        assert reports[name]["estimated_memory_mb"] <= 1000 * float(gigabytes)
    assert reports["pieces"]["exact"]
    assert [reports[name]["streamed"] for name in ("pieces", "tiles")] == [True, False]
    assert reports["pieces"]["pieces"] > 1
    assert not reports["tiles"]["exact"]
    whole, pieces, tiles = (np.asarray(nib.load(tmp_path / f"{n}.nii").dataobj) for n in ("whole", "pieces", "tiles"))
    np.testing.assert_array_equal(pieces, whole)
    assert (tiles != whole).mean() < 0.2
    for gigabytes, code, words in (("0.1", 1, "needs more memory than allowed"), ("0", 2, "above 0"), ("nan", 2, "GB")):
        assert predict(made.export, scan, tmp_path / "no.nii", "--max-memory", gigabytes) == code
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no.nii").exists()


def test_outputs_are_refused_before_anything_is_computed(made, scan, tmp_path, capsys):
    before = {p: p.read_bytes() for p in scan}
    link = tmp_path / "link.nii.gz"
    link.symlink_to(scan[0])
    (tmp_path / "folder.nii").mkdir()
    for out, options, words in (
        (scan[1], (), "is the scan itself"),
        (link, (), "is the scan itself"),
        (tmp_path / "mask.png", (), ".nii or .nii.gz"),
        (tmp_path / ".nii.gz", (), ".nii or .nii.gz"),
        (tmp_path / "nowhere" / "mask.nii.gz", (), "does not exist"),
        (tmp_path / "folder.nii", (), "is a directory"),
        (tmp_path / "mask.dcm", (), "DICOM SEG needs a DICOM series"),
        (tmp_path / "mask.nii", ("--format", "seg"), "DICOM SEG needs a DICOM series"),
        (tmp_path / "mask.nii", ("--volumes", str(tmp_path / "v.txt")), ".json or .csv"),
        (tmp_path / "mask.nii", ("--max-memory", "-1"), "above 0"),
    ):
        assert predict(made.export, scan, out, *options) == 2, out
        assert words in capsys.readouterr().err
    folder = write_scan(tmp_path / "in", ("x_0000.nii.gz", "x_0001.nii.gz"))[0].parent
    assert predict(made.export, [folder], folder) == 2
    assert "is the folder of the scans" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in scan} == before


def test_what_is_wrong_with_scan_and_model_is_named(made, scan, tmp_path, capsys):
    out = tmp_path / "mask.nii.gz"
    moved = nib.load(scan[1])
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj), affine()), tmp_path / "moved.nii")
    odd = write_scan(tmp_path, ("tiny0.nii", "tiny1.nii"))
    for path in odd:
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj).copy(), affine("RAS", (0.01, 0.01, 0.01))), path)
    flat = tmp_path / "flat.nii"
    nib.save(nib.Nifti1Image(np.zeros((5, 5), np.int16), np.eye(4)), flat)
    cases = {
        "has the wrong number of channels": scan[:1],
        "wrong number of image files": [*scan, scan[0]],
        "file not found": [scan[0], tmp_path / "gone.nii.gz"],
        "does not lie on the grid": [scan[0], tmp_path / "moved.nii"],
        "voxels of another order of size": odd,
        "is not a 3-D volume": [flat, flat],
        "is not a NIfTI file": [made.export / "README.md"],
        "holds no scan": [made.export],
    }
    for words, scans in cases.items():
        assert predict(made.export, scans, out) in (1, 2), words
        assert words in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "gone"), *map(str, scan), "-o", str(out)]) == 1
    assert "is not an exported model" in capsys.readouterr().err
    for name, engine in (("model.bin", "openvino"), ("model.onnx", "onnx"), ("model.safetensors", "torch")):
        damaged = tmp_path / engine
        shutil.copytree(made.export, damaged)
        content = bytearray((damaged / name).read_bytes())
        content[1000] ^= 1
        (damaged / name).write_bytes(bytes(content))
        assert predict(damaged, scan, out, "--engine", engine) == 1
        assert f"{name}: has changed since the export" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("options", [(), ("--probabilities",)])
def test_a_full_disk_leaves_nothing(made, scan, tmp_path, capsys, monkeypatch, options):
    out = tmp_path / "out"
    out.mkdir()

    def full(image, path):
        Path(path).write_bytes(b"half a mask")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(nib, "save", full)
    assert predict(made.export, scan, out / "mask.nii.gz", *options) == 1
    assert "no space left to write" in capsys.readouterr().err
    assert files(out) == set()


def test_a_real_full_disk(made, scan, tmp_path):
    """A limit on the size of files, as a full file system is hard to come by: the kernel refuses in the same places."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    out = tmp_path / "out"
    out.mkdir()
    for options in ((), ("--probabilities",)):
        done = subprocess.run(
            [sys.executable, "-m", "distilldsm", "predict", made.export, *scan, "-o", out / "mask.nii", *options],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=limit,
        )
        assert done.returncode == 1, done.stderr
        assert "no space left to write" in done.stderr
        assert "Traceback" not in done.stderr
        assert files(out) == set()


def test_terminated_it_leaves_nothing(made, tmp_path):
    scan = write_scan(tmp_path / "in", ("a.nii", "b.nii"), shape=(300, 300, 90))
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "distilldsm", "predict", made.export, *scan, "-o", out / "m.nii"]
    process = subprocess.Popen([*command, "--probabilities"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not files(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    process.wait(timeout=60)
    assert process.returncode == 130
    assert files(out) == set()


def test_a_dicom_series_becomes_a_segmentation_or_nifti(single, tmp_path, capsys):
    pytest.importorskip("highdicom", reason="needs the optional group 'dicom'")
    import highdicom as hd

    from tests.io.dicom_series import write_series
    from tests.io.test_dicom import oracle

    rng = np.random.default_rng(0)
    root = tmp_path / "patient"
    for k in range(2):
        write_series(root / f"series{k}", (rng.normal(100, 40, (12, 20, 18))).astype(np.int16), step=1.5, seed=k)
    assert predict(single, [root], tmp_path / "out") == 0
    assert files(tmp_path / "out") == {"series0.dcm", "series1.dcm"}
    assert predict(single, [root / "series0"], tmp_path / "mask.nii.gz", "--probabilities") == 0
    mask = nib.load(tmp_path / "mask.nii.gz")
    voxels, matrix = oracle(root / "series0")
    assert mask.shape == voxels.shape
    np.testing.assert_allclose(mask.affine, matrix, atol=1e-4)
    assert int(mask.header["qform_code"]) == int(mask.header["sform_code"]) == 1
    found = np.asarray(mask.dataobj)
    assert len(np.unique(found)) > 1
    segmentation = hd.seg.segread(tmp_path / "out" / "series0.dcm")
    frames = segmentation.get_volume(combine_segments=True).array
    assert [(frames == n).sum() for n in (1, 2)] == [(found == n).sum() for n in (1, 2)]
    # The same voxels as NIfTI give the same mask.
    nib.save(nib.Nifti1Image(voxels, matrix), tmp_path / "same.nii")
    assert predict(single, [tmp_path / "same.nii"], tmp_path / "same_mask.nii") == 0
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "same_mask.nii").dataobj), found)
    assert predict(single, [root], tmp_path / "nifti", "--format", "nifti") == 0
    assert files(tmp_path / "nifti") == {"series0.nii.gz", "series1.nii.gz"}
    capsys.readouterr()
    assert predict(single, [next((root / "series0").iterdir())], tmp_path / "x.dcm") == 1
    assert "is a single DICOM file" in capsys.readouterr().err


def test_dicom_series_as_channels_of_one_scan(made, tmp_path, capsys):
    pytest.importorskip("highdicom", reason="needs the optional group 'dicom'")
    from tests.io.dicom_series import write_series
    from tests.io.test_dicom import oracle

    rng = np.random.default_rng(0)
    series = [tmp_path / name for name in ("first", "second")]
    for folder in series:
        write_series(folder, rng.normal(100, 40, (12, 20, 18)).astype(np.int16), step=1.5)
    assert predict(made.export, series, tmp_path / "mask.nii") == 0
    for folder in series:
        nib.save(nib.Nifti1Image(*oracle(folder)), tmp_path / f"{folder.name}.nii")
    assert predict(made.export, [tmp_path / "first.nii", tmp_path / "second.nii"], tmp_path / "same.nii") == 0
    found, expected = (np.asarray(nib.load(tmp_path / n).dataobj) for n in ("mask.nii", "same.nii"))
    np.testing.assert_array_equal(found, expected)
    assert predict(made.export, series[:1], tmp_path / "one.dcm") == 1
    assert "has the wrong number of channels" in capsys.readouterr().err
    write_series(tmp_path / "other", rng.normal(100, 40, (12, 20, 18)).astype(np.int16), step=2.5)
    assert predict(made.export, [series[0], tmp_path / "other"], tmp_path / "one.dcm") == 1
    assert "does not lie on the grid of first" in capsys.readouterr().err


def test_nothing_heavy_is_imported(made, scan, tmp_path):
    heavy = (
        "torch",
        "onnx",
        "mlflow",
        "pandas",
        "ruamel",
        "great_expectations",
        "matplotlib",
        "dvc",
        "highdicom",
    )
    code = (
        "import sys; from distilldsm.cli.main import main; code = main(sys.argv[1:]);"
        "print([m for m in {} if m in sys.modules]); sys.exit(code)"
    )
    for engine, others in (("openvino", (*heavy, "onnxruntime")), ("onnx", (*heavy, "openvino"))):
        arguments = ["predict", made.export, *scan, "-o", tmp_path / "mask.nii.gz", "--engine", engine]
        done = subprocess.run(
            [sys.executable, "-c", code.format(others), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_gzip_of_any_case_is_read_from_a_path_with_spaces(single, tmp_path):
    (path,) = write_scan(tmp_path / "a folder", ("my scan.nii",))
    packed = path.with_name("packed scan.nii.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for given in (path, packed):
        assert predict(single, [given], tmp_path / f"{given.name.split()[0]}.nii") == 0
    masks = [np.asarray(nib.load(tmp_path / n).dataobj) for n in ("my.nii", "packed.nii")]
    np.testing.assert_array_equal(*masks)
