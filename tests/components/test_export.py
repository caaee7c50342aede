"""The export stage: what it writes, and that nothing is written where the models disagree."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from distilldsm.cli.main import main
from distilldsm.components.export import STAGE, _cross_validation, run
from distilldsm.config import ExportConfig, Int8Config, TrackingConfig
from distilldsm.core.errors import DataError, UserError
from distilldsm.core.files import read_json, sha256_json, write_json
from distilldsm.core.hashes import content_hash
from distilldsm.evaluation.metrics import METRICS, VOLUMES
from distilldsm.evaluation.postprocess import write_postprocessing
from distilldsm.evaluation.tables import summarise, write_csv
from distilldsm.export import build
from distilldsm.inference.loading import load_exported, load_trained
from distilldsm.models.package import verify
from distilldsm.tracking import describe, process, run_key_of
from distilldsm.tracking.record import load
from tests.export.fake import FOLD, Exported, exported

# One voxel of these tiny volumes is a larger share than the default limit allows.
LOOSE = ExportConfig(max_voxel_difference=0.01, register_model=False, int8=Int8Config(enabled=False))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory)


@pytest.fixture
def traced(made, monkeypatch):
    """Exports take the model that was traced before; returns a list in which changes of it may be put."""
    changes: list = []

    def export_onnx(network, path):
        model = onnx.load(made.export / "model.onnx")
        for change in changes:
            change(model)
        onnx.save(model, path)

    monkeypatch.setattr(build, "export_onnx", export_onnx)
    return changes


def export(made: Exported, output: Path, config: ExportConfig = LOOSE, *, model: Path | None = None, **options) -> Path:
    inputs = {"model": model or made.model, "preprocessed": made.preprocessed}
    run(config, inputs, {"export": output}, **{"fold": FOLD, **options})
    return output


def perturb_head(model: onnx.ModelProto) -> None:
    """Make the last class win everywhere."""
    by_name = {t.name: t for t in model.graph.initializer}
    bias = by_name["head.bias"]
    values = onnx.numpy_helper.to_array(bias).copy()
    values[-1] += 100
    bias.CopyFrom(onnx.numpy_helper.from_array(values, "head.bias"))


def test_it_writes_a_whole_model_directory(made):
    written = {p.name for p in made.export.iterdir()}
    assert written == {*STAGE.output.parts, "metrics.json"}, "what dvc.yaml lists"
    assert sorted(p.name for p in (made.export / "int8").iterdir()) == ["decision.json", "model.bin", "model.xml"]
    verify(made.export)
    trained, shipped = load_file(made.model / "last.safetensors"), load_file(made.export / "model.safetensors")
    assert all(torch.equal(trained[k], shipped[k]) for k in trained)
    manifest = read_json(made.export / "manifest.json")
    assert (manifest["stage"], manifest["fold"]) == ("export", FOLD)
    parity = read_json(made.export / "parity.json")
    runtimes = {"onnx", "openvino", "openvino-auto", "openvino-int8"}
    assert {c["runtime"] for c in parity["cases"]} == runtimes
    assert len({tuple(c["shape"]) for c in parity["cases"]}) >= 3
    assert parity["int8"]["shipped"] is True
    assert parity["int8"]["cases"] == 5
    assert len({c["case"] for c in parity["cases"]}) == 3
    metrics = read_json(made.export / "metrics.json")
    assert max(metrics["voxel_difference"][name] for name in parity["held_to_it"]) <= 1e-4
    assert set(metrics["seconds_per_mvoxel"]) == {"torch", *runtimes}
    assert metrics["size_mb"]["onnx"] == pytest.approx((made.export / "model.onnx").stat().st_size / 1e6, abs=1e-3)


def test_the_parity_cases_are_held_out(made):
    held_out = read_json(made.preprocessed / "splits.json")["folds"][FOLD]["held_out"]
    assert {c["case"] for c in read_json(made.export / "parity.json")["cases"]} <= set(held_out)


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_the_exported_model_predicts_as_the_network(made, runtime):
    image = np.random.default_rng(1).normal(size=(2, 9, 30, 41)).astype(np.float32)
    expected = load_trained(made.model, device="cpu").logits(image)
    found = load_exported(made.export, runtime=runtime).logits(image)
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < (5e-2 if runtime == "openvino" else 1e-3)


def test_half_precision_weights_are_given_up_where_they_change_too_much(made, traced, tmp_path, monkeypatch):
    calls = []
    convert = build.export_openvino

    def export_openvino(onnx_path, xml_path, *, fp16):
        calls.append(fp16)
        if fp16:  # stands for a network whose weights half precision cannot hold
            model = onnx.load(onnx_path)
            perturb_head(model)
            onnx_path = tmp_path / "coarse.onnx"
            onnx.save(model, onnx_path)
        convert(onnx_path, xml_path, fp16=fp16)

    monkeypatch.setattr(build, "export_openvino", export_openvino)
    output = export(made, tmp_path / "out", ExportConfig(max_voxel_difference=0.0, register_model=False))
    assert calls == [True, False]
    metadata = verify(output)
    assert metadata.openvino_weights == "FP32"
    assert "weights in FP32" in (output / "README.md").read_text()
    assert (output / "model.bin").stat().st_size >= 4 * metadata.network.parameters * 0.95
    parity = read_json(output / "parity.json")
    held_to_it = [c for c in parity["cases"] if c["runtime"] in parity["held_to_it"]]
    assert len(held_to_it) >= 6
    assert all(c["differing_voxels"] == 0 for c in held_to_it)


def test_half_precision_halves_the_weights(made, traced, tmp_path):
    output = export(made, tmp_path / "out")
    metadata = verify(output)
    assert metadata.openvino_weights == "FP16"
    assert (output / "model.bin").stat().st_size < 2.2 * metadata.network.parameters


def test_disagreement_stops_it_and_leaves_what_was_there(made, traced, tmp_path):
    traced.append(perturb_head)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    with pytest.raises(UserError, match="disagrees with the network"):
        export(made, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*") if not p.name.endswith(".lock")] == ["out", "old"]


def copy_model(made: Exported, target: Path) -> Path:
    return Path(shutil.copytree(made.model, target))


def test_a_network_of_nonsense_is_refused(made, traced, tmp_path):
    model = copy_model(made, tmp_path / "model")
    weights = load_file(model / "last.safetensors")
    weights["head.bias"][:] = float("nan")
    save_file(weights, model / "last.safetensors")
    with pytest.raises(UserError, match="not finite"):
        export(made, tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_inputs_that_do_not_belong_together_are_refused(made, traced, tmp_path):
    with pytest.raises(DataError, match="another fold"):
        export(made, tmp_path / "out", fold=0)
    with pytest.raises(DataError, match=r"best\.safetensors: checkpoint not found"):
        export(made, tmp_path / "out", ExportConfig(checkpoint="best"))
    model = copy_model(made, tmp_path / "model")
    plan = read_json(model / "plan.json")
    write_json(model / "plan.json", plan | {"crop_to_nonzero": not plan["crop_to_nonzero"]})
    with pytest.raises(DataError, match="not the plan the model was trained with"):
        export(made, tmp_path / "out", model=model)
    write_json(model / "plan.json", plan)
    write_json(model / "model.json", read_json(model / "model.json") | {"splits": "another"})
    with pytest.raises(DataError, match="was trained on another split"):
        export(made, tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_what_training_and_evaluation_decided_travels_with_the_model(made, traced, tmp_path):
    assert verify(made.export).postprocessing is None, "it was not evaluated"
    assert verify(made.export).network.mirror_axes == ()
    model = copy_model(made, tmp_path / "model")
    changes = {"mirror_axes": ["depth", "width"], "depth_halo": 0}
    write_json(model / "model.json", read_json(model / "model.json") | changes)
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    facts = dict.fromkeys((*METRICS, *VOLUMES), 0.5) | {"hd95_mm": 3.0, "volume_predicted_ml": 2.0}
    rows = [{"case": c, "label": label, **facts} for c in ("one", "two") for label in ("shell", "core")]
    better = {"dice": 0.6, "volume_predicted_ml": 1.0}
    write_csv(evaluation / "cases.csv", rows)
    write_postprocessing(evaluation, rows, [r | better if r["label"] == "core" else r for r in rows])
    write_json(evaluation / "summary.json", summarise(rows, ["shell", "core"]))
    manifest = {
        "fold": FOLD,
        "files": {},
        "config": {"checkpoint": "last", "nsd_tolerance_mm": 1.0, "mirror": True},
        "inputs": {"model": content_hash(model), "dataset": "d", "splits": "s"},
    }
    write_json(evaluation / "manifest.json", manifest)
    inputs = {"model": model, "preprocessed": made.preprocessed, "evaluation": evaluation}
    run(LOOSE, inputs, {"export": tmp_path / "out"}, fold=FOLD)
    metadata = verify(tmp_path / "out")
    assert metadata.postprocessing == ("core",)
    assert metadata.network.mirror_axes == ("depth", "width")
    assert metadata.network.depth_halo == verify(made.export).network.depth_halo > 0, "the network's, not the file's"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "largest connected component of core" in card
    assert "flips along depth, width, in 4 times the time" in card
    assert read_json(tmp_path / "out" / "scores.json")["mirror"] is True
    # An evaluation of another training decides nothing.
    write_json(evaluation / "manifest.json", manifest | {"inputs": manifest["inputs"] | {"model": "another"}})
    run(LOOSE, inputs, {"export": tmp_path / "out"}, fold=FOLD)
    assert verify(tmp_path / "out").postprocessing is None


def test_it_reports_to_the_training_run(made, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "start", lambda *_, **__: None)
    model, output = Path(shutil.copytree(made.model, tmp_path / "model")), tmp_path / "out"
    describe(TrackingConfig(), model, name="n")
    tracked = dataclasses.replace(made, model=model)
    export(tracked, output, ExportConfig(max_voxel_difference=0.01), tracking=TrackingConfig())
    record = load(output)
    assert (record.run.key, record.adds) == (run_key_of(model), True)
    assert record.model.registered_name == "distilldsm-ellipsoids"
    assert "export_onnx_max_logit_difference" in record.metrics
    assert all(isinstance(v, float) for v in record.metrics.values())
    assert record.model.metrics.items() >= record.metrics.items()
    facts = {**record.model.metadata, **record.model.gate, **record.model.version_tags}
    assert (facts["metric"], facts["fold"], len(facts["data_hash"])) == ("dice", "1", 64)
    verify(output)
    export(tracked, output, LOOSE, tracking=TrackingConfig())
    assert load(output).model.registered_name is None
    export(tracked, output, LOOSE, tracking=TrackingConfig(enabled=False))
    assert load(output).run is None


def test_the_command_line(made, traced, tmp_path, capsys):
    (tmp_path / "params.yaml").write_text("export: {max_voxel_difference: 0.01}\ntracking: {enabled: false}\n")
    arguments = ["--params", str(tmp_path / "params.yaml"), "--preprocessed", str(made.preprocessed), "--fold", "1"]
    arguments += ["--output", str(tmp_path / "out")]
    assert main(["export", *arguments, "--model", str(made.model)]) == 0
    assert "openvino: " in capsys.readouterr().out
    assert main(["export", *arguments, "--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    verify(tmp_path / "out")
    (tmp_path / "params.yaml").write_text("export: {parity_cases: 0}\n")
    assert main(["export", *arguments, "--model", str(made.model)]) == 2


def test_the_version_names_the_cross_validation_that_holds_its_evaluation(tmp_path):
    """A cross-validation of other evaluations, left from before, must not keep the model from being champion."""
    evaluation, cv = tmp_path / "evaluation", tmp_path / "cross_validation"
    for folder in (evaluation, cv):
        folder.mkdir()
    files = {"cases.csv": "1", "figures/a.png": "2"}  # of which Kubeflow hands on the first one only
    write_json(evaluation / "manifest.json", {"files": files})
    inputs = {"evaluation": evaluation, "cross_validation": cv}
    assert _cross_validation(inputs, 1) == {}
    used = {"evaluation0": "other", "evaluation1": sha256_json(files), "models0": "a", "models1": "b"}
    write_json(cv / "manifest.json", {"inputs": used})
    found = _cross_validation(inputs, 1)
    assert found["folds"] == [0, 1]
    assert _cross_validation(inputs, 0) == {}
    write_json(cv / "manifest.json", {"inputs": {**used, "models0": "another training"}})
    assert _cross_validation(inputs, 1)["cross_validation"] != found["cross_validation"]
    write_json(cv / "manifest.json", {"inputs": {"evaluation1": sha256_json(files)}})
    assert _cross_validation(inputs, 1) == {}, "a single fold is judged for itself"
