"""The networks as data, and the modules that build them, agree."""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import signature
from types import SimpleNamespace

import pytest

from distilldsm.config.networks import MODELS, OPTION_TYPES, ModelEntry, checked_options
from distilldsm.config.presets import compose
from distilldsm.config.reference import json_schema
from distilldsm.core.errors import ConfigError
from distilldsm.models import build_model


@pytest.mark.parametrize("name", MODELS)
def test_the_defaults_keep_their_own_rules(name):
    options = MODELS[name].options
    if name == "inserted":
        options = {**options, "builder": "torch.nn:Conv2d"}
    assert checked_options(name, options) == options
    assert set(options) <= set(OPTION_TYPES)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_a_builder_that_takes_the_options(name):
    build = import_module(f"distilldsm.models.{MODELS[name].family}").build
    signature(build).bind(1, 2, **MODELS[name].fixed, **MODELS[name].options)


def test_a_network_is_an_entry_and_a_module(monkeypatch, repository):
    """What CONTRIBUTING.md promises: two places, and parameters, command line and registry know it."""
    made = SimpleNamespace(build=lambda in_channels, out_channels, **arguments: (in_channels, out_channels, arguments))
    entry = ModelEntry(summary="a dummy", family="dummy", fixed={"kind": 1}, options={"width": 1.0})
    monkeypatch.setitem(MODELS, "dummy", entry)
    monkeypatch.setitem(sys.modules, "distilldsm.models.dummy", made)
    assert build_model("dummy", in_channels=1, out_channels=3, width=2) == (1, 3, {"kind": 1, "width": 2.0})
    assert "dummy" in str(json_schema())
    assert compose(repository / "conf", ["model=dummy"])["train"]["model"]["name"] == "dummy"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("distildsm", {}, "'name' is not a known network(.|\n)*did you mean 'distill_dsm'"),
        ("unet2d", {"alpha": 0.5}, "options: unknown parameter 'alpha' of network 'unet2d'\n  rule: allowed: width"),
        ("distill_dsm", {"alpha": 1.5}, "options.alpha: has an impossible value\n  seen: 1.5\n  rule: from 0 to 1"),
        ("distill_dsm", {"shift_at": "top"}, "options.shift_at(.|\n)*rule: all, encoder, decoder, or a list of levels"),
        ("inserted", {}, "options.builder(.|\n)*rule: package.module:function"),
        ("inserted", {"builder": "os"}, "options.builder(.|\n)*seen: 'os'"),
        ("inserted", {"builder": "a:b", "in_argument": ""}, "options.in_argument(.|\n)*rule: a name"),
        ("unet3d", {"base_width": 0}, "options.base_width(.|\n)*rule: at least 1"),
    ],
)
def test_mistakes_in_options(name, options, words):
    with pytest.raises(ConfigError, match=words):
        checked_options(name, options)


def test_options_become_what_the_network_wants():
    found = checked_options("distill_dsm", {"width": 1, "alpha": "1e-1", "shift_at": [0.0, 2]})
    assert found == {"width": 1.0, "alpha": 0.1, "shift_at": (0, 2)}
    assert type(found["shift_at"][0]) is int
