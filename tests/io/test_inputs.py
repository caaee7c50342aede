"""From arguments to scans: what belongs together, what is left out, and what is remarked on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distilldsm.core.errors import ConfigError, DataError
from distilldsm.io.inputs import find_inputs, listed
from tests.io.test_nifti import write


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def found(arguments: list[Path], channels: int, *names: str) -> tuple[list[str], list[str]]:
    """Names of the scans, and the remarks."""
    remarks: list[str] = []
    scans, _ = find_inputs(arguments, channels, names, remarks.append)
    return [scan.name for scan in scans], remarks


def test_channels_whose_names_number_them_in_another_order_are_refused(tmp_path):
    first, second = touch(tmp_path, "th_090_0000.nii.gz", "th_090_0001.nii.gz")
    with pytest.raises(ConfigError, match="another order") as caught:
        find_inputs([second, first], 2)
    assert f"hint: give {first} {second}" in str(caught.value)
    assert found([first, second], 2) == (["th_090_0000"], [])
    # Other numbers say nothing of channels.
    assert found(touch(tmp_path, "b.nii", "a.nii"), 2) == (["b"], [])


def test_further_channels_for_a_model_of_one_are_remarked_on(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    scans, (remark,) = found([tmp_path], 1)
    assert scans == ["a_0000", "a_0001", "b_0000", "b_0001"]
    assert remark.endswith("each is taken for a scan: a_0001, b_0001")
    assert found(sorted(tmp_path.iterdir()), 1)[1] == [remark]
    assert found([tmp_path], 2) == (["a", "b"], [])
    assert found(touch(tmp_path / "one", "a_0000.nii.gz", "b_0001.nii.gz"), 1)[1] == []


@pytest.mark.parametrize("ending", ["seg", "mask", "label", "gt"])
def test_masks_beside_their_scans_are_left_out_of_folders(tmp_path, ending, capsys):
    masks = [f"masks/p{k}_{ending}.nii.gz" for k in range(5)]
    touch(tmp_path, *(f"scans/p{k}.nii.gz" for k in range(5)), *masks)
    scans, (remark,) = found([tmp_path], 1)
    assert scans == [f"p{k}" for k in range(5)]
    assert remark.startswith(f"{tmp_path}: left out")
    assert remark.endswith(f"masks: p0_{ending}, p1_{ending}, p2_{ending} and 2 more")
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
    (one,), _ = find_inputs([path], 2)
    with pytest.raises(DataError) as caught:
        one.read(2, names=("T1", "FLAIR"))
    told = str(caught.value)
    for words in ("seen: 1 (shape (4, 5, 6))", "rule: 2 channels (T1, FLAIR)", "hint: give a file for each of them"):
        assert words in told
    (one,), _ = find_inputs([path] * 3, 2)
    with pytest.raises(DataError, match=r"seen: 3: a\.nii, a\.nii, a\.nii\n  rule: 2 channels \(T1, FLAIR\)"):
        one.read(2, names=("T1", "FLAIR"))


def test_listed():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c", "d"]) == "a, b, c and 1 more"
