"""Presets and assignments on the defaults: what is shipped loads, and `params.yaml` is what it composes to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.config import Params
from distilldsm.config.networks import MODELS
from distilldsm.config.presets import compose, merge, set_values
from distilldsm.config.reference import as_yaml, json_schema
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import from_mapping, to_mapping
from distilldsm.data.catalog import lookup
from distilldsm.data.plan import regions_of
from distilldsm.models import build_model

ROOT = Path(__file__).resolve().parents[2]
DATASETS = sorted(p.stem for p in (ROOT / "conf" / "dataset").glob("*.yaml"))
STAGES = ("download", "validate", "preprocess", "train", "evaluate", "export", "cross_validate")


def composed(*overrides: str) -> dict:
    return compose(ROOT / "conf", overrides)


def test_params_yaml_is_the_default_composition():
    text = (ROOT / "params.yaml").read_text()
    assert text.endswith(as_yaml(composed())), "write it again: rm params.yaml && distilldsm compose"
    assert yaml.safe_load(text) == composed()
    assert text.startswith("# yaml-language-server: $schema=conf/params.schema.json\n")
    assert max(map(len, text.splitlines())) <= 120


def test_the_sample_preset_is_all_that_differs_from_the_defaults():
    expected = to_mapping(Params())
    merge(expected, yaml.safe_load((ROOT / "conf/dataset/sample.yaml").read_text()))
    expected["train"]["model"]["options"] = dict(MODELS["distill_dsm"].options)
    assert composed() == expected


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("model", MODELS)
def test_every_preset_composes_to_valid_parameters(dataset, model):
    values = composed(f"dataset={dataset}", f"model={model}", "download.source=/data")
    params = from_mapping(Params, values, where="composed")
    assert params.train.model.name == model
    if params.download.source.startswith("msd:"):
        assert lookup(params.download.source)
    assert set(params.train.model.options) == set(MODELS[model].options) - (
        {"kind", "where"} if model == "inserted" else set()
    )


def test_the_presets_that_are_promised_exist_and_set_their_own_sections():
    promised = {"sample", "hippocampus", "heart", "prostate", "pancreas", "brats2020", "acdc", "brats2015", "custom"}
    assert promised <= set(DATASETS)
    for name in DATASETS:
        values = yaml.safe_load((ROOT / "conf/dataset" / f"{name}.yaml").read_text())
        assert set(values) <= {"download", "validate", "preprocess", "train"}


def test_presets_apply_in_the_order_of_their_groups():
    values = composed("recipe=paper", "train.optimizer=sgd", "dataset=hippocampus")
    assert (values["train"]["epochs"], values["train"]["schedule"]) == (40, "plateau")
    assert values["train"]["optimizer"] == "sgd", "an assignment comes last, wherever it stands"


def test_the_papers_recipe_gives_the_papers_network():
    params = from_mapping(Params, composed("dataset=hippocampus", "recipe=paper"))
    assert params.preprocess.regions == "labels"
    index = SimpleNamespace(regions=(), labels={"background": 0, "Anterior": 1, "Posterior": 2})
    regions = regions_of(index, params.preprocess)
    model = params.train.model
    network = build_model(model.name, in_channels=1, out_channels=len(regions), **model.options)
    assert network.cost().parameters == 1_216_266
    assert (params.train.optimizer, params.train.schedule) == ("adam", "plateau")
    assert (params.train.dice_weight, params.train.cross_entropy_weight) == (1.0, 0.0)
    assert params.train.epochs == from_mapping(Params, composed("dataset=hippocampus")).train.epochs


def test_the_papers_recipe_keeps_brats_regions_and_changes_no_image():
    params = from_mapping(Params, composed("dataset=brats2020", "recipe=paper"))
    own = (SimpleNamespace(name="WT"),)
    assert regions_of(SimpleNamespace(regions=own, labels={"background": 0, "core": 1}), params.preprocess) == own
    augment = params.train.augment
    assert not augment.mirror_axes
    assert not any(getattr(augment, key) for key in vars(augment) if key.endswith("_probability"))
    assert params.train.foreground_oversampling == 0


@given(
    st.recursive(
        st.none() | st.integers(),
        lambda x: st.dictionaries(st.sampled_from(["train", "model", "options", "seed", "a"]), x),
        max_leaves=6,
    )
)
def test_merging_is_as_the_obvious_loop_over_keys(overlay):
    """Reference: every path to a leaf, where the paths end below sections of `params.yaml`."""
    if not isinstance(overlay, dict):
        return
    base = {"train": {"seed": 1, "model": {"name": "unet2d", "options": {"width": 2.0}}}, "a": {"b": 1}}
    expected = json.loads(json.dumps(base))
    sections = {(), ("train",), ("train", "model")}

    def put(values, path):
        for key, value in values.items():
            place = expected
            for step in path:
                place = place[step]
            below = (*path, key)
            if below in sections and isinstance(value, dict) and isinstance(place.get(key), dict):
                put(value, below)
            else:
                place[key] = value

    put(overlay, ())
    merge(base, overlay)
    assert base == expected


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.model.options.alpha=0.25", {"width": 2.0, "alpha": 0.25}),
        ("train.model.options={alpha:0.25}", {"alpha": 0.25}),
        ("train.model={options: {alpha: 0.25}}", {"alpha": 0.25}),
        ("train={model:{name:unet3d}}", {"width": 2.0}),
    ],
)
def test_an_assignment_changes_what_it_names(assignment, expected):
    values = {"train": {"seed": 3, "model": {"name": "unet2d", "options": {"width": 2.0}}}}
    changed = set_values(values, [assignment])
    assert changed["train"]["model"]["options"] == expected
    assert (changed["train"]["seed"], values["train"]["model"]["options"]) == (3, {"width": 2.0})


def test_an_assignment_through_a_value():
    with pytest.raises(ConfigError, match=r"'epochs' holds no parameters\n  seen: train\.epochs\.x=1"):
        set_values({"train": {"epochs": 3}}, ["train.epochs.x=1"])


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *(ROOT / "conf").glob("*/*.yaml")], ids=lambda p: p.stem)
def test_the_schema_accepts_what_is_shipped(path):
    from jsonschema import Draft7Validator

    Draft7Validator(json_schema()).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ("trian: {}", []),
        ("train: {epoch: 1}", ["train"]),
        ("train: {epochs: 0}", ["train", "epochs"]),
        ("train: {epochs: many}", ["train", "epochs"]),
        ("train: {ema_decay: 1.0}", ["train", "ema_decay"]),
        ("train: {learning_rate: 0}", ["train", "learning_rate"]),
        ("train: {learning_rate: fast}", ["train", "learning_rate"]),
        ("train: {optimizer: adamww}", ["train", "optimizer"]),
        ("train: {model: {name: distildsm}}", ["train", "model", "name"]),
        ("preprocess: {target_spacing_mm: [1, 1]}", ["preprocess", "target_spacing_mm"]),
        ("download: {pattern: {images: []}}", ["download", "pattern"]),
        ("cv: {folds: [-1]}", ["cv", "folds", 0]),
    ],
)
def test_the_schema_refuses_what_the_parameters_refuse(wrong, where):
    from jsonschema import Draft7Validator

    values = yaml.safe_load(wrong)
    assert [list(error.path) for error in Draft7Validator(json_schema()).iter_errors(values)] == [where]
    with pytest.raises(ConfigError):
        from_mapping(Params, values)


@pytest.mark.parametrize("right", ["train: {learning_rate: 1e-3}", "train: {epochs: 3.0, batch_size: null}", "cv: {}"])
def test_the_schema_accepts_what_the_parameters_accept(right):
    from jsonschema import Draft7Validator

    values = yaml.safe_load(right)
    Draft7Validator(json_schema()).validate(values)
    from_mapping(Params, values)


def test_the_shipped_schema_is_the_one_of_the_parameters():
    shipped = json.loads((ROOT / "conf/params.schema.json").read_text())
    assert shipped == json_schema(), "write it again: distilldsm params --schema > conf/params.schema.json"


def test_dvc_yaml_names_existing_code():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for dep in stage.get("do", stage)["deps"]:
            if dep.startswith(("distilldsm", "conf")):
                assert (ROOT / dep).exists(), dep
