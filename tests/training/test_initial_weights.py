"""A training starts from given weights, all of them, or says which it does not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from distilldsm.components.train import STAGE, run
from distilldsm.config import ModelConfig, PreprocessConfig, TrainConfig
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.output_directory import is_current
from distilldsm.data.preprocess import preprocess_dataset
from distilldsm.models import build_model
from distilldsm.training import loop
from distilldsm.training.initial_weights import load_initial_weights
from distilldsm.training.loop import Trainer
from tests.data.volumes import write_dataset
from tests.models.small import OWN, TwoLevels

WIDTH = {"width": 0.25}


def network(name="distill_dsm", *, classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return build_model(name, in_channels=2, out_channels=classes, **(OWN if name == "inserted" else WIDTH), **options)


def same(one, other):
    return all(torch.equal(one.state_dict()[k], v) for k, v in other.state_dict().items())


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory):
    root, output = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("data") / "preprocessed"
    preprocess_dataset(root, write_dataset(root, cases=4), PreprocessConfig(folds=2, workers=1), output)
    return output


@pytest.fixture
def weights(tmp_path):
    """Writes a network's tensors."""

    def write(made):
        save_file(made.state_dict(), tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    return write


def config(**changes):
    values = {"model": ModelConfig(options=WIDTH), "epochs": 2, "batch_size": 2, "checkpoint_minutes": 0.0}
    return TrainConfig(**{**values, **changes})


@pytest.mark.parametrize("name", ["distill_dsm", "unet2d", "inserted"])
def test_its_own_weights(name, weights):
    given, started = network(name), network(name, seed=1)
    assert load_initial_weights(started, weights(given)) == []
    assert same(given, started)


@pytest.mark.parametrize("name", ["distill_dsm", "inserted"])
def test_those_of_the_2d_network_keep_its_features(name, weights):
    flat = network("unet2d") if name == "distill_dsm" else TwoLevels(2, 3)
    started = network(name, seed=1, initialisation="identity")
    others = load_initial_weights(started, weights(flat))
    assert others
    assert all("shift" in other for other in others)
    x = torch.randn(1, 2, 3, 32, 32)
    slices = x[0].transpose(0, 1)
    with torch.no_grad():
        expected = flat.eval()(x)[0].transpose(0, 1) if name == "distill_dsm" else flat.eval()(slices)
        assert torch.equal(started.eval()(x)[0].transpose(0, 1), expected)


def test_what_does_not_fit_is_named(weights):
    before, started = network(seed=1), network(seed=1)
    path = weights(network(classes=5))
    with pytest.raises(DataError) as caught:
        load_initial_weights(started, path)
    for word in ("w.safetensors", "2 in another shape", "head.weight (5, 4, 1, 1) for (3, 4, 1, 1)", "strict: false"):
        assert word in str(caught.value), caught.value
    assert same(before, started)
    assert load_initial_weights(started, path, strict=False) == ["head.weight", "head.bias"]
    assert torch.equal(started.head.weight, before.head.weight)
    assert torch.equal(started.encoder[0].first[0].weight, load_file(path)["encoder.0.first.0.weight"])
    with pytest.raises(DataError, match=r"missing: (.|\n)*not of the network: down.0"):
        load_initial_weights(started, weights(TwoLevels(2, 3)))


def test_a_file_that_has_nothing_of_it(weights):
    with pytest.raises(DataError, match="does not fit the network"):
        load_initial_weights(network(), weights(torch.nn.Conv2d(1, 1, 1)), strict=False)


def test_a_pickle_is_not_loaded(tmp_path):
    torch.save(network().state_dict(), tmp_path / "w.pt")
    with pytest.raises(DataError, match="never loaded"):
        load_initial_weights(network(), tmp_path / "w.pt")


def test_a_training_starts_from_an_earlier_one(preprocessed, tmp_path, monkeypatch, capsys):
    inputs, given = {"preprocessed": preprocessed}, tmp_path / "given.safetensors"
    run(config(), inputs, {"model": tmp_path / "first"}, fold=0)
    shutil.copyfile(tmp_path / "first" / "last.safetensors", given)
    settings = config(initial_weights=str(given))
    (tmp_path / "work").mkdir()
    started = Trainer(settings, preprocessed=preprocessed, work=tmp_path / "work", fold=0)
    for tensors in (started.network.state_dict(), started.average.network.state_dict()):
        assert all(torch.equal(tensors[k], v) for k, v in load_file(given).items())
    assert f"train: starts from {given}" in capsys.readouterr().err

    original = Trainer._train_epoch

    def interrupt(self, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return original(self, epoch)

    monkeypatch.setattr(Trainer, "_train_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(settings, inputs, {"model": tmp_path / "second"}, fold=0)
    monkeypatch.setattr(Trainer, "_train_epoch", original)
    monkeypatch.setattr(loop, "load_initial_weights", lambda *a, **k: pytest.fail("it goes on from its own"))
    run(settings, inputs, {"model": tmp_path / "second"}, fold=0)

    hashes = json.loads((tmp_path / "second" / "manifest.json").read_text())["inputs"]
    assert set(hashes) == {"preprocessed", "initial_weights"}
    assert is_current(tmp_path / "second", **STAGE.key(settings, inputs, 0))
    shutil.copyfile(tmp_path / "second" / "last.safetensors", given)
    assert not is_current(tmp_path / "second", **STAGE.key(settings, inputs, 0))


def test_no_such_file(preprocessed, tmp_path):
    settings = config(initial_weights="nothing.safetensors")
    message = r"train.initial_weights: no such file(.|\n)*nothing.safetensors(.|\n)*leave it out"
    with pytest.raises(ConfigError, match=message):
        run(settings, {"preprocessed": preprocessed}, {"model": tmp_path / "m"}, fold=0)
    assert not list(tmp_path.iterdir())


def test_deep_supervision_is_turned_off_where_there_are_no_levels(preprocessed, tmp_path, capsys):
    settings = config(model=ModelConfig(name="inserted", options=OWN), epochs=1, deep_supervision=2)
    Trainer(settings, preprocessed=preprocessed, work=tmp_path, fold=0).run()
    assert "inserted has no known decoder levels: trained without train.deep_supervision" in capsys.readouterr().err
