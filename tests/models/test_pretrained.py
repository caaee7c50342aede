"""The network that ships with the package."""

from __future__ import annotations

import json
import tarfile

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.models.catalogue import SHIPPED, Catalogue
from distilldsm.models.package import verify

HELD_OUT = ("hippocampus_008", "hippocampus_065", "hippocampus_083")
"""Cases of the fold that its training did not see."""


def test_shipped_networks_are_in_the_catalogue_whole_and_small():
    names = {name for name, entry in Catalogue.load().models.items() if entry.address is None}
    assert names == {path.name for path in SHIPPED.iterdir()}
    for name, entry in Catalogue.load().models.items():
        if name not in names:
            continue
        metadata = verify(SHIPPED / name)
        card = (SHIPPED / name / "README.md").read_text()
        assert metadata.data.licence in card
        assert entry.input in card
        assert f"distilldsm predict {name} " in card
        assert "Scores on held-out cases" in card
        assert max(path.stat().st_size for path in (SHIPPED / name).iterdir()) <= 5e6


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_hippocampus_segments_scans_that_it_has_not_seen(hippocampus_archive, tmp_path, capsys, engine):
    with tarfile.open(hippocampus_archive) as archive:
        for case in HELD_OUT:
            for folder in ("imagesTr", "labelsTr"):
                archive.extract(f"Task04_Hippocampus/{folder}/{case}.nii.gz", tmp_path, filter="data")
    root = tmp_path / "Task04_Hippocampus"
    scans = [str(root / "imagesTr" / f"{case}.nii.gz") for case in HELD_OUT]
    assert main(["predict", "hippocampus", *scans, "-o", str(tmp_path / "masks"), "--engine", engine, "--json"]) == 0
    assert not any(scan["unlike_training"] for scan in json.loads(capsys.readouterr().out)["scans"])
    for case in HELD_OUT:
        truth = np.asarray(nib.load(root / "labelsTr" / f"{case}.nii.gz").dataobj)
        mask = np.asarray(nib.load(tmp_path / "masks" / f"{case}.nii.gz").dataobj)
        for label in (1, 2):
            both = ((truth == label) & (mask == label)).sum()
            assert 2 * both / ((truth == label).sum() + (mask == label).sum()) > 0.8


def test_a_whole_head_is_unlike_its_training_scans(tmp_path, capsys):
    head = nib.Nifti1Image(np.random.default_rng(0).normal(100, 30, (32, 32, 32)).astype(np.float32), np.eye(4) * 3)
    nib.save(head, tmp_path / "head.nii.gz")
    command = ["predict", "hippocampus", str(tmp_path / "head.nii.gz"), "-o", str(tmp_path / "mask.nii.gz")]
    assert main(command) == 0
    assert "unlike" in capsys.readouterr().err
    assert main([*command, "--strict"]) == 1
