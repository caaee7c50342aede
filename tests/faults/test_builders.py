"""Code that a model's file names is carried out only if the user's parameters, or the environment, name it too."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from distilldsm.cli.main import main
from distilldsm.core.errors import DataError
from distilldsm.models import build_model, inserted
from distilldsm.models.checkpoint import load_network, save_tensors
from distilldsm.models.inserted import TRUST_VARIABLE, trust_builder
from tests.models.small import OWN


@pytest.fixture(autouse=True)
def _nothing_trusted(monkeypatch):
    monkeypatch.setattr(inserted, "_trusted", set())


@pytest.fixture
def model(tmp_path):
    network = build_model("inserted", in_channels=2, out_channels=3, **OWN, arguments={"width": 16})
    save_tensors(tmp_path / "last.safetensors", network.state_dict(), {})
    options = {**OWN, "arguments": {"width": 16}}
    described = {"name": "inserted", "options": options, "in_channels": 2, "out_channels": 3}
    (tmp_path / "model.json").write_text(json.dumps(described))
    return tmp_path


def test_a_models_code_is_carried_out_only_if_the_parameters_name_it(model):
    told = rf"model.json: names code(.|\n)*TwoLevels(.|\n)*params.yaml(.|\n)*{TRUST_VARIABLE}"
    with pytest.raises(DataError, match=told):
        load_network(model)
    trust_builder({"width": 1.0})
    trust_builder({**OWN, "arguments": {"width": 8}})  # the same code with other arguments is another matter
    with pytest.raises(DataError, match="code that you did not allow is not run"):
        load_network(model)
    trust_builder({**OWN, "arguments": {"width": 16}})
    with torch.no_grad():
        assert load_network(model)(torch.zeros(1, 2, 3, 8, 8)).shape == (1, 3, 3, 8, 8)


def test_the_environment_may_name_it(model, monkeypatch):
    monkeypatch.setenv(TRUST_VARIABLE, f"other:thing, {OWN['builder']}")
    assert load_network(model).stride == (1, 4, 4)


def test_nothing_of_a_strangers_is_imported(model, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    described = json.loads((model / "model.json").read_text())
    for options in ({"builder": "stranger:x"}, {"builder": ""}, {}):
        (model / "model.json").write_text(json.dumps({**described, "options": options}))
        with pytest.raises(DataError):
            load_network(model)
    assert "stranger" not in sys.modules


def test_sizes_beyond_reason_are_refused(model, monkeypatch):
    monkeypatch.setenv(TRUST_VARIABLE, OWN["builder"])
    described = json.loads((model / "model.json").read_text())
    described["options"]["arguments"] = {"width": 10**9}
    (model / "model.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="more than 4096"):
        load_network(model)


def test_the_stage_trusts_what_its_parameters_name(tmp_path, monkeypatch):
    """That it then finds no data is another matter."""
    (tmp_path / "params.yaml").write_text(json.dumps({"train": {"model": {"name": "inserted", "options": OWN}}}))
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate"]) == 1
    inserted.require_trusted(OWN, "model.json")
