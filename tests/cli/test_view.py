"""`distilldsm view`: what it writes, what it opens, what it refuses."""

from __future__ import annotations

import base64
import gzip
import json
import webbrowser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from tests.io.test_nifti import claims_much, write
from tests.report import volumes
from tests.report.test_viewer_fragment import Elements


def save(path: Path, array: np.ndarray, affine=volumes.AFFINE) -> str:
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    return {
        "image": save(tmp_path / "scan.nii.gz", volumes.image()),
        "truth": save(tmp_path / "truth.nii", volumes.truth()),
        "mask": save(tmp_path / "mask.nii.gz", volumes.prediction()),
    }


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """What the browser is asked to open."""
    seen: list[str] = []
    monkeypatch.setattr(webbrowser, "open", seen.append)
    monkeypatch.setenv("DISPLAY", ":0")
    return seen


def content(page: Path) -> tuple[dict, list[dict[str, np.ndarray | None]]]:
    """The description in a page, and the voxels of its cases."""
    scripts = Elements(page.read_text()).scripts
    about = json.loads(scripts["dsm-viewer-cases"])

    def voxels(key: str | None) -> np.ndarray | None:
        if key is None:
            return None
        packed = base64.b64decode(scripts[f"dsm-viewer-{key}"])
        return nib.Nifti1Image.from_bytes(gzip.decompress(packed)).get_fdata()

    return about, [{kind: voxels(case[kind]) for kind in ("image", "truth", "prediction")} for case in about["cases"]]


def test_the_page_holds_the_scan_and_the_masks(files, tmp_path, opened, capsys):
    page = tmp_path / "page.html"
    names = ["--labels", "shell=3,core=7"]
    assert main(["view", files["image"], files["mask"], "--truth", files["truth"], *names, "-o", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert opened == [page.as_uri()]
    about, (case,) = content(page)
    assert np.abs(case["image"] - volumes.image()).max() <= 1  # but for the outermost thousandth
    assert np.array_equal(case["truth"], volumes.truth())
    assert np.array_equal(case["prediction"], volumes.prediction())
    assert about["cases"][0]["name"] == "mask"
    assert [(label["name"], label["value"]) for label in about["labels"]] == [("shell", 3), ("core", 7)]


def test_by_default_it_owns_its_folder_and_names_the_values(files, tmp_path, opened, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["view", files["image"], "--truth", files["truth"], "--no-open"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page.name == "scan.html"
    assert page.parent.stat().st_mode & 0o077 == 0
    assert opened == []
    about, (case,) = content(page)
    assert case["prediction"] is None
    assert [label["name"] for label in about["labels"]] == ["label 3", "label 7"]
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert main(["view", files["image"]]) == 0
    assert opened == []


def test_several_masks_are_a_choice_and_share_the_scan(files, tmp_path, capsys):
    other = tmp_path / "other" / "mask.nii.gz"
    other.parent.mkdir()
    save(other, volumes.truth())
    page = tmp_path / "page.html"
    for masks in ([files["mask"], str(other)], [files["mask"], files["mask"], str(other)]):  # one of them twice, too
        assert main(["view", files["image"], *masks, "-o", str(page), "--no-open"]) == 0
        about, cases = content(page)
        assert [case["name"] for case in about["cases"]] == masks
        assert len({case["image"] for case in about["cases"]}) == 1
        for name, case in zip(masks, cases, strict=True):
            assert np.array_equal(case["prediction"], volumes.truth() if name == str(other) else volumes.prediction())


def test_large_volumes_lose_voxels_and_it_says_so(files, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["view", files["image"], files["mask"], "-o", str(page), "--no-open", "--max-voxels", "2000"]
    assert main(arguments) == 0
    assert "20 x 30 x 24 voxels are more than --max-voxels 2000" in capsys.readouterr().err
    _, (case,) = content(page)
    assert case["image"].shape == case["prediction"].shape
    assert case["image"].size <= 2000


def test_a_dicom_series_is_an_image_too(tmp_path, capsys):
    pytest.importorskip("pydicom", reason="needs the optional group 'dicom'")
    from distilldsm.io import read_scan
    from tests.io.dicom_series import write_series

    series = tmp_path / "series"
    write_series(series, np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(np.int16))
    (series / "readme").touch()
    scan = read_scan([series], 1)
    mask = save(tmp_path / "mask.nii.gz", (scan.channels[0].raw > 100).astype(np.uint8), scan.affine)
    assert main(["view", str(series), mask, "-o", str(tmp_path / "page.html"), "--no-open"]) == 0
    assert capsys.readouterr().err == f"{series / 'readme'}: left out: not DICOM\n"
    _, (case,) = content(tmp_path / "page.html")
    assert np.abs(case["image"] - scan.channels[0].raw).max() <= 1
    assert np.array_equal(case["prediction"], scan.channels[0].raw > 100)


def test_a_mask_on_another_grid_is_refused_with_both_grids(files, tmp_path, capsys):
    shifted = volumes.AFFINE.copy()
    shifted[0, 3] += 1
    page = ["-o", str(tmp_path / "page.html"), "--no-open"]
    for name, array, affine in (
        ("shifted.nii.gz", volumes.prediction(), shifted),
        ("cropped.nii.gz", volumes.prediction()[1:], volumes.AFFINE),
    ):
        assert main(["view", files["image"], save(tmp_path / name, array, affine), *page]) == 1
        text = capsys.readouterr().err
        grids = ("does not lie on the grid of scan.nii.gz", "shape (20, 30, 24)", "[0.0, -1.5, 0.0, 40.0]")
        for words in (name, *grids, "hint: resample the mask"):
            assert words in text
        assert f"shape {array.shape}" in text
        assert str(affine[0].tolist()) in text
    assert not (tmp_path / "page.html").exists()


def test_what_is_no_volume_is_refused(files, tmp_path, capsys):
    (tmp_path / "text.nii.gz").write_text("no volume")
    four = save(tmp_path / "four.nii.gz", np.zeros((3, 3, 3, 2), np.int16))
    half = save(tmp_path / "half.nii.gz", np.full(volumes.SHAPE, 0.5, np.float32))
    page = str(tmp_path / "page.html")
    for arguments, code, words in (
        ([str(tmp_path / "gone.nii.gz")], 1, "file not found"),
        ([str(tmp_path / "text.nii.gz")], 1, "is not a readable NIfTI file"),
        ([__file__], 1, "is not a NIfTI file"),
        ([four], 1, "shape (3, 3, 3, 2)"),
        ([str(tmp_path)], 2, "holds several scans"),
        ([files["image"], str(tmp_path / "gone.nii.gz")], 1, "file not found"),
        ([files["image"], half], 1, "not whole numbers"),
        ([files["image"], "--labels", "shell"], 2, "NAME=VALUE"),
        ([files["image"], "--labels", "shell=300"], 2, "NAME=VALUE"),
        ([files["image"], "--labels", "a=1,b=1"], 2, "gives two names to one value"),
        ([files["image"], "--model", str(tmp_path)], 1, "is not an exported model"),
        ([files["image"], "--max-voxels", "0"], 2, "--max-voxels"),
    ):
        assert main(["view", *arguments, "-o", page, "--no-open"]) == code, arguments
        assert words in capsys.readouterr().err
        assert not Path(page).exists()


def test_no_input_is_overwritten(files, tmp_path, capsys):
    link = tmp_path / "link.html"
    link.symlink_to(files["image"])
    before = Path(files["image"]).read_bytes()
    for output, words in (
        (link, "is an input"),
        (tmp_path / "page.txt", ".html"),
        (tmp_path / "gone" / "page.html", "does not exist"),
    ):
        assert main(["view", files["image"], "-o", str(output), "--no-open"]) == 2
        assert words in capsys.readouterr().err
    assert Path(files["image"]).read_bytes() == before


def test_a_page_that_cannot_be_written_is_told_by_its_name(files, tmp_path, capsys, monkeypatch):
    def refused(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", refused)
    assert main(["view", files["image"], "-o", str(tmp_path / "page.html"), "--no-open"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/page.html: cannot be written\n  seen: Permission")


def test_a_scan_or_mask_beyond_the_memory_budget_is_refused_by_its_header(tmp_path, capsys):
    large = claims_much(tmp_path / "large.nii.gz")
    assert main(["view", str(large), "-o", str(tmp_path / "page.html")]) == 1
    assert "needs more memory than allowed" in capsys.readouterr().err
    small = write(tmp_path / "small.nii", np.zeros((40, 50, 60), np.int16))
    mask = write(tmp_path / "mask.nii", np.zeros((40, 50, 60), np.uint8))
    command = ["view", str(small), str(mask), "-o", str(tmp_path / "page.html"), "--no-open", "--max-voxels", "1000"]
    assert main([*command, "--max-memory", "0.001"]) == 1
    assert "hint: raise --max-memory" in capsys.readouterr().err
    assert main([*command, "--max-memory", "0.1"]) == 0
    assert main(["view", str(small), str(large), "-o", str(tmp_path / "page.html")]) == 1
    assert "does not lie on the grid of small.nii" in capsys.readouterr().err
