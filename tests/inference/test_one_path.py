"""evaluate, predict, the bundle and the Python interface give one mask, byte for byte."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import distilldsm
from distilldsm.cli.main import main
from distilldsm.config import EvaluateConfig
from distilldsm.core.errors import DataError
from distilldsm.data.dataset import DatasetIndex
from distilldsm.evaluation.scoring import score_all
from distilldsm.models.checkpoint import load_network
from tests.data.volumes import affine
from tests.export.fake import CHANNELS, TARGETS, Exported, exported

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory)


@pytest.fixture
def scan(made) -> list[Path]:
    return [made.raw / path for path in DatasetIndex.load(made.raw).cases[1].images]


def test_masks_of_evaluate_predict_and_the_bundle(made, tmp_path):
    index = DatasetIndex.load(made.raw)
    cases = index.cases[:2]  # one in RAS, one in LPS orientation
    for name in ("predictions", "timing", "scores"):
        (tmp_path / name).mkdir()
    score_all(EvaluateConfig(workers=1), [made.model], made.raw, tmp_path, cases, index, TARGETS)
    for case in cases:
        files = [made.raw / path for path in case.images]
        out = tmp_path / f"{case.id}.nii.gz"
        assert main(["predict", str(made.export), *map(str, files), "-o", str(out), "--engine", "torch"]) == 0
        evaluated = tmp_path / "predictions" / f"{case.id}.nii.gz"
        assert gzip.decompress(evaluated.read_bytes()) == gzip.decompress(out.read_bytes())
        mask = np.asarray(nib.load(out).dataobj)
        assert len(np.unique(mask)) > 1, "a mask of one label would make any comparison pass"

        pytest.importorskip("monai", reason="needs the optional group 'monai'")
        from distilldsm.inference.monai import SaveMaskd, ToNetworkSpaced, VolumeInferer

        plan = str(made.export / "plan.json")
        data = ToNetworkSpaced(plan)({"image": [str(path) for path in files], "source": case.id})
        logits = VolumeInferer()(data["image"][None], load_network(made.model))[0]
        SaveMaskd(plan, str(tmp_path / "bundle"))({**data, "pred": logits})
        assert gzip.decompress((tmp_path / "bundle" / out.name).read_bytes()) == gzip.decompress(out.read_bytes())


def test_every_source_of_the_python_interface_gives_the_mask_of_predict(made, scan, tmp_path):
    assert main(["predict", str(made.export), *map(str, scan), "-o", str(tmp_path / "mask.nii")]) == 0
    expected = np.asarray(nib.load(tmp_path / "mask.nii").dataobj)
    model = distilldsm.load_model(made.export)
    assert model.labels == {"background": 0, "shell": 1, "core": 2}
    assert model.channels == ("T0", "T1")
    images = [nib.load(path) for path in scan]
    array = np.stack([np.asarray(image.dataobj) for image in images])
    both = nib.Nifti1Image(np.moveaxis(array, 0, -1), images[0].affine)
    stored = distilldsm.read_scan(scan, model.channels)
    for source, options in ((scan, {}), (stored, {}), (both, {}), (array, {"affine": images[0].affine})):
        found = model.predict(source, **options)
        np.testing.assert_array_equal(found.mask, expected)
        np.testing.assert_allclose(found.scan.affine, images[0].affine)
        assert found.probabilities is None
    voxel_ml = abs(np.linalg.det(images[0].affine)) / 1000
    assert found.volumes_ml["core"] == pytest.approx((expected == 2).sum() * voxel_ml, abs=1e-3)
    maps = model.predict(scan, probabilities=True, max_memory_gb=4).probabilities
    np.testing.assert_array_equal(maps.argmax(axis=-1), expected)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-5)
    distilldsm.write_mask(tmp_path / "again.nii", found.mask, stored)
    assert (tmp_path / "again.nii").read_bytes() == (tmp_path / "mask.nii").read_bytes()

    with pytest.raises(DataError, match="needs its affine"):
        model.predict(array)
    with pytest.raises(DataError, match="number of channels"):
        model.predict(scan[0])
    with pytest.raises(DataError, match="sheared"):
        model.predict(array, affine=affine() + 0.3 * np.eye(4, k=1))
    with pytest.raises(DataError, match="is not an exported model"):
        distilldsm.load_model(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distilldsm.nothing


def test_the_readmes_example_runs_without_torch(made, scan, tmp_path):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[1]
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "fold0").symlink_to(made.export)
    images = [nib.load(path) for path in scan]
    voxels = np.stack([np.asarray(image.dataobj) for image in images], axis=-1)
    assert voxels.shape[-1] == CHANNELS
    nib.save(nib.Nifti1Image(voxels, images[0].affine), tmp_path / "scan.nii.gz")
    check = "\nimport sys\nassert not {'torch', 'mlflow', 'onnxruntime'} & set(sys.modules)\n"
    light = "import distilldsm, sys\nassert 'numpy' not in sys.modules\n"
    environment = {**os.environ, "PYTHONPATH": str(README.parent)}
    done = subprocess.run(
        [sys.executable, "-c", light + code + check],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "shell" in done.stdout
    assert nib.load(tmp_path / "mask.nii.gz").shape == images[0].shape
