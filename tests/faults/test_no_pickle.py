"""Whatever a file is called and whatever it holds: nothing in it is carried out, and the error tells what to do."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distilldsm.cli.main import main
from distilldsm.config import ModelConfig, TrainConfig
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.export.monai_bundle import _inert
from distilldsm.inference.loading import load_trained
from distilldsm.models.checkpoint import load_network, load_tensors
from distilldsm.models.package import METADATA, MONAI_BUNDLE
from distilldsm.training.loop import RESUME, Trainer
from distilldsm.training.patches import open_array
from tests.data.volumes import write_case
from tests.export.fake import CHANNELS, FOLD
from tests.faults.payloads import KINDS, Canary, rehash, told


@pytest.fixture
def model(made, tmp_path) -> Path:
    """A training directory to spoil."""
    return shutil.copytree(made.model, tmp_path / "model")


@pytest.fixture
def package(made, tmp_path) -> Path:
    """An exported model to spoil."""
    return shutil.copytree(made.export, tmp_path / "export")


@pytest.fixture
def scan(tmp_path) -> list[str]:
    case = write_case(tmp_path / "scan", "one", channels=CHANNELS)
    return [str(tmp_path / "scan" / image) for image in case.images]


def predict(package: Path, scan: list[str], *arguments: str) -> int:
    return main(["predict", str(package), *scan, "-o", str(package.parent / "mask.nii.gz"), *arguments])


@pytest.mark.parametrize("kind", KINDS)
def test_the_payloads_are_real(tmp_path, kind):
    canary = Canary(tmp_path / "sings")
    content = canary.pickled(kind)
    if kind == "pickle":
        pickle.loads(content)
    else:
        (tmp_path / "x.pt").write_bytes(content)
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert canary.sings
    again = Canary(tmp_path / "sings again")
    (tmp_path / "x.npy").write_bytes(again.array())
    np.load(tmp_path / "x.npy", allow_pickle=True)
    assert again.sings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["last.safetensors", "last.pt", "resume.safetensors"])
def test_a_pickle_by_any_name_is_no_checkpoint(tmp_path, canary, kind, name):
    (tmp_path / name).write_bytes(canary.pickled(kind))
    with pytest.raises(
        DataError, match=r"not a readable checkpoint(.|\n)*seen(.|\n)*never loaded(.|\n)*hint"
    ) as caught:
        load_tensors(tmp_path / name)
    assert name in str(caught.value)


def test_a_training_does_not_go_on_from_a_pickle(made, tmp_path, canary, capsys):
    settings = TrainConfig(model=ModelConfig(options={"width": 0.25}), epochs=1, batch_size=2)
    for name in (RESUME, "best.pt", "checkpoint.pth"):
        (tmp_path / name).write_bytes(canary.pickled("torch"))
    assert Trainer(settings, preprocessed=made.preprocessed, work=tmp_path, fold=FOLD).state.epoch == 0
    assert re.search(r"resume\.safetensors is not a readable checkpoint: .*starts again", capsys.readouterr().err)
    assert not (tmp_path / RESUME).exists()


@pytest.mark.parametrize("stage", ["evaluate", "export"])
def test_stages_refuse_a_pickled_checkpoint(made, model, tmp_path, canary, capsys, stage):
    (model / "last.safetensors").write_bytes(canary.pickled("torch"))
    (model / "last.pt").write_bytes(canary.pickled("torch"))
    shutil.copyfile(made.preprocessed / "plan.json", model / "plan.json")
    common = ["--fold", str(FOLD), "--model", str(model), "--preprocessed", str(made.preprocessed)]
    common += ["--output", str(tmp_path / "out")]
    codes = {
        "evaluate": lambda: main(["evaluate", *common, "--dataset", str(made.raw)]),
        "export": lambda: main(["export", *common]),
    }
    assert codes[stage]() == 1
    told(capsys.readouterr().err, "last.safetensors", "seen: ", "rule: ", "hint: ")
    assert not (tmp_path / "out").exists()


def test_prediction_refuses_pickled_weights(package, scan, canary, capsys):
    (package / "model.safetensors").write_bytes(canary.pickled("torch"))
    assert predict(package, scan, "--engine", "torch") == 1
    told(capsys.readouterr().err, "model.safetensors", "has changed since the export", "hint: ")
    rehash(package)
    assert predict(package, scan, "--engine", "torch") == 1
    told(capsys.readouterr().err, "model.safetensors", "not a readable checkpoint", "never loaded", "hint: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "os.system"},
        {"name": ["unet2d"]},
        {"name": "__class__"},
        {"options": {"width": "$__import__('os')"}},
        {"options": {"name": "unet2d"}},
        {"options": {"in_channels": 1}},
        {"options": {"shift": "none"}},
        {"options": {"__class__": "x"}},
        {"options": ["width"]},
        {"options": {"width": 1e300}},
        {"options": {"width": {"__reduce__": 1}}},
        {"options": {"alpha": -3}},
        {"in_channels": 10**12},
        {"in_channels": True},
        {"out_channels": "3"},
        {"out_channels": None},
    ],
    ids=str,
)
def test_odd_descriptions_of_a_network(model, changes):
    write_json(model / "model.json", {**read_json(model / "model.json"), **changes})
    with pytest.raises(DataError) as caught:
        load_network(model)
    assert str(model / "model.json") in str(caught.value)
    assert "hint: " in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '"text"', "null", "[" * 100_000, "{", "\0"])
def test_a_description_that_is_none(model, content, capsys):
    (model / "model.json").write_text(content)
    with pytest.raises(Exception, match=r"model.json") as caught:
        load_trained(model, device="cpu")
    assert caught.type.__name__ in ("DataError", "UserError")
    write_json(model / "model.json", {"mirror_axes": ["os.system"]})
    with pytest.raises(DataError, match="has invalid mirror_axes"):
        load_trained(model, mirror="trained", device="cpu")


def test_what_lies_beside_an_exported_model_is_left_alone(package, scan, canary, capsys):
    for name in ("model.pkl", "model.pt", "python_model.pkl", "weights.joblib", "model.bin.pkl", "data.npy"):
        (package / name).write_bytes(canary.pickled())
    (package / "sitecustomize.py").write_text(f"import pathlib; pathlib.Path({str(canary.path)!r}).touch()")
    for config in ("inference.json", "metadata.json"):
        path = package / MONAI_BUNDLE / "configs" / config
        write_json(path, {**read_json(path), "run": [canary.expression()], "initialize": [canary.expression()]})
    assert main(["info", str(package)]) == 1
    told(capsys.readouterr().err, "inference.json", "has changed since the export")
    rehash(package)
    assert main(["info", str(package)]) == 0
    for engine in ("openvino", "onnx", "torch"):
        assert predict(package, scan, "--engine", engine) == 0, capsys.readouterr().err


def test_odd_metadata_of_an_exported_model(package, scan, canary, capsys):
    good = read_json(package / METADATA)
    rehash(package)
    network = good["network"]
    for changes in (
        {"files": {**good["files"], "../../../../../../etc/passwd": "0" * 64}},
        {"files": {**good["files"], "/etc/passwd": "0" * 64}},
        {"network": {**network, "options": {"width": canary.expression()}}},
        {"network": {**network, "name": "builtins.eval"}},
        {"network": {**network, "_target_": "os.system"}},
        {"labels": {"background": 0, "a": canary.expression()}},
    ):
        write_json(package / METADATA, {**good, **changes})
        assert predict(package, scan, "--engine", "torch") == 1
        told(capsys.readouterr().err, METADATA)


def test_nothing_that_monai_would_carry_out_comes_from_a_data_set(canary):
    written = {"licence": canary.expression(), "name": ["@network", "%../secret.json::key", "plain $5"], "n": 3}
    assert _inert(written) == {
        "licence": " " + canary.expression(),
        "name": [" @network", " %../secret.json::key", "plain $5"],
        "n": 3,
    }


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("place", ["../../../../../../etc/passwd", "/etc/passwd", "link.bin"])
def test_onnx_weights_outside_the_model(package, scan, capsys, engine, place):
    import onnx

    network = onnx.load(str(package / "model.onnx"))
    weights = network.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", place), ("offset", "0"), ("length", "16")):
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    (package / "link.bin").symlink_to("/etc/passwd")
    (package / "model.onnx").write_bytes(network.SerializeToString())
    rehash(package)
    if engine == "onnx":
        assert predict(package, scan, "--engine", engine) == 1
        told(capsys.readouterr().err, "model.onnx", "cannot be loaded by ONNX Runtime", "hint: ")
    else:
        from distilldsm.export.openvino_export import export_openvino

        with pytest.raises(DataError, match="cannot be loaded by OpenVINO"):
            export_openvino(package / "model.onnx", package / "new.xml", fp16=True)


@pytest.mark.parametrize("piece", ["xml", "bin", "entity", "extension"])
def test_spoiled_pieces_of_an_openvino_model(package, scan, canary, capsys, piece):
    text = (package / "model.xml").read_text()
    if piece == "xml":
        (package / "model.xml").write_bytes(canary.pickled("torch"))
    elif piece == "bin":
        (package / "model.bin").write_bytes(canary.pickled())
    elif piece == "entity":
        entity = '<!DOCTYPE net [<!ENTITY who SYSTEM "file:///etc/passwd">]>'
        (package / "model.xml").write_text(text.replace("<net ", entity + "<net ", 1).replace('name="', 'name="&who;'))
    else:
        (package / "model.xml").write_text(text.replace('version="opset1"', f'version="{canary.path}.so"'))
    rehash(package)
    code = predict(package, scan, "--engine", "openvino")
    captured = capsys.readouterr()
    assert "root:" not in captured.out + captured.err
    if piece != "entity" or code:  # it is no error if the entity is taken for the text that it is
        assert code == 1
        told(captured.err, "model.xml", "cannot be loaded by OpenVINO", "seen: ", "hint: ")


@pytest.mark.parametrize("folder", ["images", "labels", "locations"])
def test_arrays_of_objects_are_not_read(made, tmp_path, canary, capsys, folder):
    spoiled = shutil.copytree(made.preprocessed, tmp_path / "preprocessed")
    for path in (spoiled / folder).glob("*.npy"):
        path.write_bytes(canary.array())
    params = tmp_path / "params.yaml"
    params.write_text(
        "train: {model: {options: {width: 0.25}}, epochs: 1, batch_size: 2, foreground_oversampling: 1.0}\n"
        "tracking: {enabled: false}\npreprocess: {folds: 2}\n"
    )
    code = main(
        [
            "train",
            "--params",
            str(params),
            "--fold",
            "0",
            "--preprocessed",
            str(spoiled),
            "--output",
            str(tmp_path / "m"),
        ]
    )
    assert code == 1
    told(capsys.readouterr().err, f"{folder}/case_0", "cannot be read", "nothing is unpickled", "hint: ")


@pytest.mark.parametrize("kind", ["object", "npz", "pickle", "torch", "empty", "text"])
def test_what_is_no_array_of_numbers(tmp_path, canary, kind):
    path = tmp_path / "x.npy"
    if kind == "npz":
        np.savez(tmp_path / "y.npz", x=np.array([canary.evil()], dtype=object))
        (tmp_path / "y.npz").rename(path)
    else:
        content = {"object": canary.array(), "empty": b"", "text": b"__import__('os')"}
        path.write_bytes(content.get(kind) or (b"" if kind == "empty" else canary.pickled(kind)))
    with pytest.raises(DataError, match=r"x.npy: cannot be read(.|\n)*nothing is unpickled(.|\n)*hint"):
        open_array(path)
