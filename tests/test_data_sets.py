"""Every preset of a published data set, end to end on small made volumes of that layout and spacing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.components import download, evaluate, export, preprocess, train, validate
from distilldsm.config import Params
from distilldsm.core.files import read_json
from distilldsm.core.mapping import from_mapping
from distilldsm.data.plan import Plan
from distilldsm.inference.loading import load_trained
from distilldsm.io import read_scan
from distilldsm.models.inserted import trust_builder
from distilldsm.models.package import load_metadata
from tests.config.test_presets import composed
from tests.data.published import SHAPES, write_brats_case, write_published


def params_of(name: str, source: Path, *overrides: str) -> Params:
    return from_mapping(
        Params,
        composed(
            f"dataset={name}",
            f"download.source={source}",
            "preprocess.folds=2",
            "preprocess.workers=1",
            "validate.workers=1",
            "train.epochs=1",
            "train.batch_size=2",
            "train.samples_per_case=1",
            "evaluate.workers=1",
            "export.int8.enabled=false",
            "export.register_model=false",
            "export.max_voxel_difference=1",
            *overrides,
        ),
    )


NARROW = ("train.model.options.width=0.25",)


def run_stages(
    name: str, root: Path, *overrides: str, network: Sequence[str] = NARROW, exports: bool = False
) -> SimpleNamespace:
    """The stages, called as functions; the export, which takes most of the time, only if asked for."""
    params = params_of(name, write_published(name, root / "source"), *network, *overrides)
    trust_builder(params.train.model.options)
    at = SimpleNamespace(**{k: root / k for k in ("raw", "validation", "arrays", "model", "scores", "export")})
    download.run(params.download, {}, {"dataset": at.raw})
    validate.run(params.validate, {"dataset": at.raw}, {"validation": at.validation})
    preprocess.run(params.preprocess, {"dataset": at.raw, "validation": at.validation}, {"preprocessed": at.arrays})
    train.run(params.train, {"preprocessed": at.arrays}, {"model": at.model}, fold=0)
    scored = {"dataset": at.raw, "preprocessed": at.arrays, "model": at.model}
    evaluate.run(params.evaluate, scored, {"evaluation": at.scores}, fold=0)
    if exports:
        export.run(params.export, {"model": at.model, "preprocessed": at.arrays}, {"export": at.export}, fold=0)
    return at


STRUCTURES = {
    "heart": ["left atrium"],
    "hippocampus": ["Anterior", "Posterior"],
    "prostate": ["PZ", "TZ"],
    "pancreas": ["pancreas", "cancer"],
    "brats2020": ["WT", "TC", "ET"],
    "acdc": ["RV", "MYO", "LV"],
    "brats2015": ["necrosis", "oedema", "non_enhancing", "enhancing"],
}
EXPORTED = ("heart", "brats2020")
"""A network of one's own with labels, and regions of four files. The others differ in what comes before the export."""


OWN = ("model=inserted", "train.model.options.arguments.features=[8,8,8,8,8,8]")
"""The heart is found by MONAI's network."""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_preset_runs_end_to_end(name, tmp_path, monkeypatch, capfd):
    if name == "heart":
        pytest.importorskip("monai")
    more = ("recipe=paper", "train.epochs=2") if name == "hippocampus" else ()
    at = run_stages(name, tmp_path, *more, network=OWN if name == "heart" else NARROW, exports=name in EXPORTED)
    plan, summary = Plan.load(at.arrays / "plan.json"), read_json(at.scores / "summary.json")
    assert list(summary["labels"]) == STRUCTURES[name]
    assert plan.depth_axis == ("y" if name == "hippocampus" else "z")
    spacing = sorted(SHAPES[name][1])
    assert plan.target_spacing_mm[0] == pytest.approx(spacing[-1])
    assert plan.coarse_slices == (spacing[-1] / spacing[0] >= 3)
    schemes = {rule.scheme for rule in plan.normalisation}
    assert schemes == {{"pancreas": "ct"}.get(name, "zscore")}
    # A sigmoid each, no background: the regions, and the paper's recipe.
    classes = len(STRUCTURES[name]) + (name not in ("brats2020", "hippocampus"))
    assert read_json(at.model / "model.json")["out_channels"] == classes
    folds = read_json(at.arrays / "splits.json")["folds"]
    if name == "acdc":  # both phases of a heart stand on one side
        for fold in folds:
            assert not {c[:10] for c in fold["train"]} & {c[:10] for c in fold["held_out"]}
    if name == "hippocampus":
        losses = [record["train_loss"] for record in read_json(at.model / "history.json")]
        assert losses[-1] < losses[0] < 1  # Dice alone

    case = sorted(folds[0]["held_out"])[0]
    if name == "brats2020":
        tried = read_json(at.scores / "postprocessing.json")["labels"]
        assert {region: one["scores_of"] for region, one in tried.items()} == {"WT": STRUCTURES[name]}
        check_brats(at, tmp_path, case)
        return
    channels, scored = channels_of(at.raw, name, case), nib.load(at.scores / "predictions" / f"{case}.nii.gz")
    if name == "heart":
        assert "trained without train.deep_supervision" in capfd.readouterr().err
        monkeypatch.setattr("distilldsm.models.inserted._trusted", set())
        check_own_network(at, channels, scored.get_fdata(), tmp_path, capfd)
    else:
        found = load_trained(at.model).predict(read_scan(channels, len(plan.channels))).mask
        np.testing.assert_array_equal(found, np.asarray(scored.dataobj))


def channels_of(raw: Path, name: str, case: str) -> list[Path]:
    """The image files of a case, in the order of its channels."""
    if name == "brats2015":
        return sorted(next(raw.rglob(case)).glob("*_subtrMeanDivStd.nii.gz"))
    return sorted((raw / "imagesTr").glob(f"{case}*"))


def check_own_network(at: SimpleNamespace, channels: list[Path], scored: np.ndarray, tmp_path: Path, capfd) -> None:
    metadata = load_metadata(at.export)
    assert metadata.outputs[0].shape[1] == 2
    assert metadata.network.stride == (1, 32, 32)
    assert metadata.network.options["arguments"] == {"spatial_dims": 2, "features": (8, 8, 8, 8, 8, 8)}
    predict = ["predict", str(at.export), *map(str, channels)]
    for engine in ("openvino", "onnx"):  # graphs: nothing of the builder's is carried out
        mask = tmp_path / f"{engine}.nii.gz"
        assert main([*predict, "-o", str(mask), "--engine", engine]) == 0
        assert np.mean(nib.load(mask).get_fdata() == scored) > 0.999
    assert main([*predict, "-o", str(tmp_path / "m.nii.gz"), "--engine", "torch"]) == 1
    assert "DISTILLDSM_BUILDER=monai.networks.nets:BasicUNet" in capfd.readouterr().err


def check_brats(at: SimpleNamespace, tmp_path: Path, case: str) -> None:
    """A folder of unlabelled cases becomes what the validation portal takes: CASE.nii.gz with 0, 1, 2, 4."""
    scans, masks = tmp_path / "validation", tmp_path / "masks"
    names = ["BraTS20_Validation_001", "BraTS20_Validation_002"]
    for k, name in enumerate(names):
        write_brats_case(scans, name, 50 + k, labelled=False)
    assert main(["predict", str(at.export), str(scans), "-o", str(masks)]) == 0
    assert sorted(p.name for p in masks.iterdir()) == [f"{name}.nii.gz" for name in names]
    image = nib.load(scans / names[0] / f"{names[0]}_t1ce.nii.gz")
    mask = nib.load(masks / f"{names[0]}.nii.gz")
    assert mask.shape == image.shape
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert set(np.unique(mask.get_fdata())) <= {0, 1, 2, 4}

    one = tmp_path / "one"
    folder = next((at.raw).rglob(case))
    assert main(["predict", str(at.export), str(folder), "-o", str(one)]) == 0  # its _seg file is no channel
    scored = nib.load(at.scores / "predictions" / f"{case}.nii.gz").get_fdata()
    assert np.mean(nib.load(one / f"{case}.nii.gz").get_fdata() == scored) > 0.999

    (scans / names[1] / f"{names[1]}_t2.nii.gz").unlink()
    assert main(["predict", str(at.export), str(scans), "-o", str(tmp_path / "rest")]) == 1
    assert [p.name for p in (tmp_path / "rest").iterdir()] == [f"{names[0]}.nii.gz"]
