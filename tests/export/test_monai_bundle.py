"""The MONAI bundle: run by MONAI's own runner, its masks are those of `distilldsm predict`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from distilldsm.cli.main import main
from distilldsm.core.errors import DataError
from distilldsm.models.package import MONAI_BUNDLE
from tests.data.volumes import affine, stretched, write_case
from tests.export.fake import CHANNELS, Exported, exported

pytest.importorskip("monai", reason="needs the optional group 'monai'")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory)


@pytest.fixture
def bundle(made, tmp_path) -> Path:
    """The bundle alone, away from the directory it was exported to."""
    return shutil.copytree(made.export / MONAI_BUNDLE, tmp_path / "bundle")


def run_bundle(bundle: Path, scans: Path, masks: Path) -> subprocess.CompletedProcess[str]:
    line = ["-m", "monai.bundle", "run", "--bundle_root", ".", "--meta_file", "configs/metadata.json"]
    line += ["--config_file", "configs/inference.json", "--dataset_dir", str(scans), "--output_dir", str(masks)]
    return subprocess.run([sys.executable, *line], cwd=bundle, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_monais_runner_gives_our_masks_in_any_geometry(made, bundle, tmp_path):
    grids = {"plain": affine(), "turned": affine("LPS", (1.3, 0.9, 1.1)), "swapped": affine("SAR", (2.0, 1.0, 0.8))}
    for seed, (name, matrix) in enumerate(grids.items()):
        write_case(tmp_path, name, matrix=matrix, channels=CHANNELS, seed=seed)
    scans, masks = tmp_path / "imagesTr", tmp_path / "masks"
    done = run_bundle(bundle, scans, masks)
    assert done.returncode == 0, done.stderr
    assert main(["predict", str(made.export), str(scans), "-o", str(tmp_path / "ours"), "--engine", "torch"]) == 0
    assert {p.name for p in masks.iterdir()} == {f"{name}.nii.gz" for name in grids}
    for name in grids:
        theirs, ours = (nib.load(folder / f"{name}.nii.gz") for folder in (masks, tmp_path / "ours"))
        np.testing.assert_allclose(theirs.affine, ours.affine)
        assert np.mean(np.asarray(theirs.dataobj) != np.asarray(ours.dataobj)) <= 1e-4
        assert len(np.unique(ours.dataobj)) > 1


@pytest.mark.slow
def test_a_scan_that_lacks_a_channel_fails(bundle, tmp_path):
    write_case(tmp_path, "one", channels=1)
    done = run_bundle(bundle, tmp_path / "imagesTr", tmp_path / "masks")
    assert done.returncode != 0
    assert not (tmp_path / "masks").exists()


def test_a_scan_in_metres_is_taken_as_predict_takes_it(made, tmp_path):
    from distilldsm.inference.monai import SaveMaskd, ToNetworkSpaced

    case = write_case(tmp_path, "one", channels=CHANNELS)
    in_mm = [tmp_path / name for name in case.images]
    (tmp_path / "metres").mkdir()
    in_metres = [stretched(p, tmp_path / "metres" / p.name, scale=1e-3, unit="meter") for p in in_mm]
    plan = str(made.export / "plan.json")
    masks = {}
    for name, paths in (("mm", in_mm), ("metres", in_metres)):
        data = ToNetworkSpaced(plan)({"image": [str(p) for p in paths], "source": name})
        logits = torch.cat((data["image"], data["image"][:1]))  # any that differ from place to place
        masks[name] = SaveMaskd(plan, str(tmp_path / "masks"))({**data, "pred": logits})["pred"]
    np.testing.assert_array_equal(masks["metres"], masks["mm"])
    assert len(np.unique(masks["mm"])) > 1
    for name, paths, unit in (("mm", in_mm, "unknown"), ("metres", in_metres, "meter")):
        mask, scan = nib.load(tmp_path / "masks" / f"{name}.nii.gz"), nib.load(paths[0])
        np.testing.assert_allclose(mask.affine, scan.affine, rtol=1e-6)
        assert mask.header.get_xyzt_units()[0] == unit
        np.testing.assert_array_equal(mask.dataobj, masks[name])


def test_a_geometry_that_predict_refuses(made, tmp_path):
    from distilldsm.inference.monai import ToNetworkSpaced

    case = write_case(tmp_path, "one", channels=CHANNELS)
    paths = [str(stretched(tmp_path / name, tmp_path / Path(name).name, scale=30)) for name in case.images]
    with pytest.raises(DataError, match="another order of size"):
        ToNetworkSpaced(str(made.export / "plan.json"))({"image": paths, "source": "one"})


def test_what_monai_expects_of_a_bundle_is_there(bundle, tmp_path):
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs/inference.json"),
        meta_file=str(bundle / "configs/metadata.json"),
        workflow_type="inference",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(tmp_path / "imagesTr"),
    )
    write_case(tmp_path, "one", channels=CHANNELS)
    workflow.initialize()
    assert not workflow.check_properties()
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    # Required by MONAI's schema of the metadata (meta_schema_20240725.json).
    required = "schema version changelog monai_version pytorch_version numpy_version required_packages_version task"
    required += " description authors copyright network_data_format"
    assert set(required.split()) <= set(metadata)
    data = metadata["network_data_format"]
    assert data["inputs"]["image"]["num_channels"] == CHANNELS
    assert data["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "shell", "2": "core"}


def test_it_names_no_path_of_the_machine_and_holds_no_pickle(made, bundle):
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors", ""}
    for path in files:
        assert str(made.export.parent).encode() not in path.read_bytes()
