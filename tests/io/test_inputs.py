"""From arguments to scans: what belongs together, what is left out, and what is remarked on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.io import read_scan
from distilldsm.io.inputs import find_inputs, listed, refuse_input
from distilldsm.io.output import replacing
from tests.io.dicom_series import other_object, write_series
from tests.io.test_nifti import write


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def found(arguments: list[Path], channels: int, *names: str) -> tuple[list[str], list[str]]:
    """Names of the scans, and the remarks."""
    remarks: list[str] = []
    scans, *_ = find_inputs(arguments, channels, names, remarks.append)
    return [scan.name for scan in scans], remarks


def test_channels_whose_names_number_them_in_another_order_are_refused(tmp_path):
    first, second = touch(tmp_path, "th_090_0000.nii.gz", "th_090_0001.nii.gz")
    with pytest.raises(ConfigError, match="order of the channels does not match") as caught:
        find_inputs([second, first], 2)
    assert f"hint: give {first} {second}" in str(caught.value)
    assert found([first, second], 2) == (["th_090_0000"], [])
    # Other numbers say nothing of channels.
    assert found(touch(tmp_path, "b.nii", "a.nii"), 2) == (["b"], [])


def test_further_channels_for_a_model_of_one_are_remarked_on(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    scans, (remark,) = found([tmp_path], 1)
    assert scans == ["a_0000", "a_0001", "b_0000", "b_0001"]
    assert remark.endswith("each is read as a scan: a_0001, b_0001")
    assert found(sorted(tmp_path.iterdir()), 1)[1] == [remark]
    assert found([tmp_path], 2) == (["a", "b"], [])
    assert found(touch(tmp_path / "one", "a_0000.nii.gz", "b_0001.nii.gz"), 1)[1] == []


@pytest.mark.parametrize("ending", ["seg", "mask", "label", "gt"])
def test_masks_beside_their_scans_are_left_out_of_folders(tmp_path, ending, capsys):
    masks = [f"masks/p{k}_{ending}.nii.gz" for k in range(5)]
    touch(tmp_path, *(f"scans/p{k}.nii.gz" for k in range(5)), *masks)
    scans, (remark,) = found([tmp_path], 1)
    assert scans == [f"p{k}" for k in range(5)]
    shown = ", ".join(f"p{k}_{ending}.nii.gz" for k in range(3))
    assert remark == f"{tmp_path}: left out (named like a mask): {shown} and 2 more"
    find_inputs([tmp_path], 1)
    assert capsys.readouterr().err == remark + "\n"
    # Of two channels likewise; a file that is given itself, or whose scan is not there, is a scan.
    touch(tmp_path / "two", "p_0000.nii", "p_0001.nii", f"p_{ending}.nii")
    assert found([tmp_path / "two"], 2)[0] == ["p"]
    touch(tmp_path / "numbered", "p_0000.nii", f"p_{ending}_0000.nii")
    assert found([tmp_path / "numbered"], 1) == (["p", f"p_{ending}"], [])
    assert found([tmp_path / masks[0]], 1) == ([f"p0_{ending}"], [])
    assert found([tmp_path / "masks"], 1) == ([f"p{k}_{ending}" for k in range(5)], [])


def test_a_missing_channel_is_told_with_the_names_of_all(tmp_path):
    path = write(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16))
    (one,), *_ = find_inputs([path], 2)
    with pytest.raises(DataError) as caught:
        one.read(2, names=("T1", "FLAIR"))
    told = str(caught.value)
    for words in ("seen: 1 (shape (4, 5, 6))", "rule: 2 channels (T1, FLAIR)", "hint: give one file per channel"):
        assert words in told
    (one,), *_ = find_inputs([path] * 3, 2)
    with pytest.raises(DataError, match=r"seen: 3: a\.nii, a\.nii, a\.nii\n  rule: 2 channels \(T1, FLAIR\)"):
        one.read(2, names=("T1", "FLAIR"))


def test_files_named_after_the_channels_are_one_scan_in_the_models_order(tmp_path):
    names = ("T1", "FLAIR")
    touch(tmp_path, "b_flair.nii.gz", "b_t1.nii.gz", "b_seg.nii.gz", "a_t1.nii.gz", "a_flair.nii.gz")
    scans, many, _ = find_inputs([tmp_path], 2, names)
    assert many
    assert [(one.name, [path.name for path in one.paths]) for one in scans] == [
        (case, [f"{case}_t1.nii.gz", f"{case}_flair.nii.gz"]) for case in "ab"
    ]
    # A case that lacks a channel is kept, so that reading it tells; without any whole case the names mean nothing.
    (tmp_path / "a_flair.nii.gz").unlink()
    assert [len(one.paths) for one in find_inputs([tmp_path], 2, names)[0]] == [1, 2]
    touch(tmp_path / "other", "b_flair.nii.gz", "a_t1.nii.gz")
    assert found([tmp_path / "other"], 2, *names)[0] == ["a_t1", "b_flair"]
    # Files of a case that are no channel are named; two files of one channel stay, so that reading the case tells.
    touch(tmp_path / "more", "b_t1.nii.gz", "b_flair.nii.gz", "b_t2.nii.gz", "b_seg.nii.gz", "a_t1.nii", "a_T1.nii.gz")
    touch(tmp_path / "more", "a_flair.nii.gz")
    for arguments in ([tmp_path / "more"], sorted((tmp_path / "more").iterdir())):
        scans, _, skipped = find_inputs(arguments, 2, names, tell=lambda remark: None)
        assert {one.name: len(one.paths) for one in scans} == {"a": 3, "b": 2}
        assert sorted(one.path.name for one in skipped) == ["b_seg.nii.gz", "b_t2.nii.gz"]
    # A file of no case: the names are not those of channels.
    touch(tmp_path, "stranger.nii.gz")
    assert len(found([tmp_path], 2, *names)[0]) == 5


def test_series_are_channels_where_their_number_is_that_of_the_model(tmp_path):
    folders = [tmp_path / name for name in "cab"]
    for folder in folders:
        folder.mkdir()
        (folder / "1").write_bytes(bytes(128) + b"DICM")
    assert [one.paths for one in find_inputs(folders, 3)[0]] == [tuple(folders)]
    assert found(folders, 2)[0] == found([tmp_path], 3)[0] == ["a", "b", "c"]
    assert found(folders[:1], 1)[0] == ["c"]


def test_every_scan_of_a_folder_is_read_or_named(tmp_path):
    """What cannot be read stays among the scans: reading it is the error."""
    write(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.int16))
    touch(tmp_path, "B.NII.GZ", "d.nrrd", "e.MHA", "f.nii.bz2", "notes.txt", ".hidden.nii", "masks/a.nii.gz")
    touch(tmp_path, "scan", "g.zip", "README", "a.json", "a.bval")
    (tmp_path / "c.nii.gz").symlink_to("gone")
    (tmp_path / "series").symlink_to("not mounted")
    for folder in ("dicom", "sub/deep", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "linked").symlink_to("sub")
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "empty/1.dcm")
    scans, many, skipped = find_inputs([tmp_path], 1, tell=lambda remark: None)
    assert many
    assert [one.name for one in scans] == ["B", "a", "c", "dicom", "empty", "linked_deep", "series"]
    assert {one.path.name: one.reason for one in skipped} == {
        **dict.fromkeys(("d.nrrd", "e.MHA", "f.nii.bz2", "scan", "g.zip"), "another format or ending"),
        "a.nii.gz": "in a folder beside scans",
    }
    assert scans[1].read(1).shape == (4, 5, 6)
    for one in scans[:1] + scans[2:]:
        with pytest.raises(DataError) as caught:
            one.read(1)
        assert caught.value.where.startswith(str(one.paths[0]))
    _, remarks = found([tmp_path], 1)
    assert remarks == [
        f"{tmp_path}: left out (another format or ending): d.nrrd, e.MHA, f.nii.bz2 and 2 more",
        f"{tmp_path}: left out (in a folder beside scans): a.nii.gz",
    ]
    # Without scans of its own, a folder stands for all scans below it, as BIDS lays them out.
    touch(tmp_path / "bids", "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T1w.json", "sub-02/x_T1w.nii")
    assert found([tmp_path / "bids"], 1) == (["sub-01_T1w", "x_T1w"], [])
    touch(tmp_path / "foreign", "a.nrrd")
    with pytest.raises(DataError, match=r"holds no scan(.|\n)*a\.nrrd \(another format or ending\)"):
        found([tmp_path / "foreign"], 1)


def test_series_of_a_study_without_slices_are_left_out(tmp_path):
    pytest.importorskip("pydicom", reason="needs the optional group 'dicom'")
    voxels = np.zeros((3, 5, 7), np.int16)
    paths = write_series(tmp_path / "t1", voxels)
    write_series(tmp_path / "plan", voxels[:2], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "mosaic", voxels[:1], ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])
    (tmp_path / "report").mkdir()
    other_object(tmp_path / "report" / "1", paths[0], "1.2.840.10008.5.1.4.1.1.88.11")
    scans, _, skipped = find_inputs([tmp_path], 1, tell=lambda remark: None)
    assert [one.name for one in scans] == ["mosaic", "t1"]
    assert {one.path.name: one.reason.split(" (")[0] for one in skipped} == {
        "plan": "localizer",
        "report": "object without an image",
    }
    assert scans[1].read(1).shape == (7, 5, 3)
    with pytest.raises(DataError, match="is a mosaic"):
        scans[0].read(1)
    # The same below a series, which is then the only scan.
    (tmp_path / "plan").rename(tmp_path / "t1" / "plan")
    touch(tmp_path / "t1", "other/a.nrrd")
    scans, many, skipped = find_inputs([tmp_path / "t1"], 1, tell=lambda remark: None)
    assert ([one.name for one in scans], many) == (["t1"], False)
    assert {one.path.name for one in skipped} == {"a.nrrd", "plan"}
    (tmp_path / "t1" / "plan").rename(tmp_path / "plan")
    # A series that is named itself is read, whatever it is.
    assert found([tmp_path / "plan"], 1) == (["plan"], [])


@pytest.mark.parametrize(
    ("channels", "files", "refused"),
    [
        (("T1", "FLAIR"), ("p_t1", "p_flair"), False),
        (("T1", "FLAIR"), ("p_FLAIR", "p_t1"), True),
        (("T1", "FLAIR"), ("flair", "T1"), True),
        (("T1", "FLAIR"), ("p_t1", "p_t2"), True),
        (("T1w", "T1gd"), ("p_t1", "p_t1ce"), False),
        (("T1w", "T1gd"), ("p-t1ce", "p-t1"), True),
        (("T2", "T2 FLAIR"), ("p_t2", "p_t2_flair"), False),
        (("T2", "T2 FLAIR"), ("p_t2_flair", "p_t2"), True),
        (("left", "right"), ("p_right", "p_left"), True),
        (("left", "right"), ("p_t1", "p_t2"), False),
        (("T1", "FLAIR"), ("p_start1", "p_aflair"), False),
        (("T1", "FLAIR"), ("p_0000", "p_0001"), False),
        (("T1", "FLAIR"), ("p_0000", "p_0002"), True),
        (("T1", "FLAIR"), ("p_0001", "p_0002"), True),
        (("T1", "FLAIR"), ("p_0003", "q_0007"), False),
        (("T1", "FLAIR"), ("t1_0007", "flair_0007"), False),
        (("FLAIR",), ("p_t1",), True),
        (("MRI",), ("p_t1",), False),
        (("CT",), ("direct",), False),
    ],
)
def test_files_named_like_another_channel_are_refused(tmp_path, channels, files, refused):
    paths = [write(tmp_path / f"{name}.nii.gz", np.zeros((4, 5, 6), np.int16)) for name in files]
    if refused:
        with pytest.raises(ConfigError, match=r"names|named like") as caught:
            read_scan(paths, len(channels), names=channels)
        rule = ", ".join(channels), ", ".join(f"_{k:04d} {name}" for k, name in enumerate(channels))
        assert caught.value.rule in (f"the model's channels: {rule[0]}", rule[1])
        if sorted(files) == ["p_FLAIR", "p_t1"]:
            assert caught.value.hint == f"give {paths[1]} {paths[0]}"
    else:
        assert len(read_scan(paths, len(channels), names=channels).channels) == len(channels)


def test_no_input_is_overwritten(tmp_path):
    (file,) = touch(tmp_path, "series/1")
    for output in (file, tmp_path / "series" / ".." / "series" / "1"):
        for given in ([file], [tmp_path / "none", file.parent]):
            with pytest.raises(ConfigError, match="is an input"):
                refuse_input(output, given, "is an input")
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(ConfigError, match="is an input"):
        refuse_input(tmp_path / "link", [file.parent], "is an input")
    touch(tmp_path, "other", "series/2")
    refuse_input(tmp_path / "other", [file, file.parent], "is an input")
    refuse_input(tmp_path / "series" / "new", [file, file.parent], "is an input")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EACCES, "be written")],
)
def test_a_file_is_whole_or_absent(tmp_path, number, words):
    def write_half(then: int) -> None:
        with replacing(tmp_path / "a", ".txt") as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text("half")
            if then:
                raise OSError(then, os.strerror(then))

    with pytest.raises(UserError, match=words):
        write_half(number)
    assert list(tmp_path.iterdir()) == []
    write_half(0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_listed():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c", "d"]) == "a, b, c and 1 more"
