"""Every shipped YAML loads, and `params.yaml` is what the defaults compose to."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distilldsm.config import Params, load_params
from distilldsm.config.networks import MODELS
from distilldsm.core.mapping import from_mapping, to_mapping
from distilldsm.data.plan import regions_of
from distilldsm.models import build_model

ROOT = Path(__file__).resolve().parents[2]
DATASETS = sorted(p.stem for p in (ROOT / "conf" / "dataset").glob("*.yaml"))
STAGES = ("download", "validate", "preprocess", "train", "evaluate", "export", "cross_validate")
MODEL_PRESETS = sorted(p.stem for p in (ROOT / "conf" / "model").glob("*.yaml"))


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)


def test_params_yaml_is_the_default_composition():
    assert yaml.safe_load((ROOT / "params.yaml").read_text()) == composed()


def test_params_yaml_lists_every_parameter():
    def keys(value, prefix=""):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield f"{prefix}{key}"
                yield from keys(inner, f"{prefix}{key}.")

    listed = set(keys(yaml.safe_load((ROOT / "params.yaml").read_text())))
    assert {k for k in keys(to_mapping(Params())) if not k.startswith("train.model.options.")} <= listed


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("model", MODEL_PRESETS)
def test_every_preset_composes_to_valid_parameters(dataset, model):
    params = from_mapping(
        Params, composed(f"dataset={dataset}", f"model={model}", "download.source=/data"), where="composed"
    )
    assert params.train.model.name == model


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


def test_every_model_has_a_preset_with_known_options():
    assert set(MODEL_PRESETS) == set(MODELS)
    for name in MODEL_PRESETS:
        options = load_params(ROOT / "conf" / "model" / f"{name}.yaml").train.model.options
        assert set(options) <= set(MODELS[name].options)


def test_dvc_yaml_names_existing_code():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for dep in stage.get("do", stage)["deps"]:
            if dep.startswith(("distilldsm", "conf")):
                assert (ROOT / dep).exists(), dep


SHAPING = {"io", "data", "validation", "models", "training", "inference", "evaluation", "export", "drift"}
"""Packages whose code decides what a stage writes; the others read parameters, show progress, track."""


def imported(path: Path) -> set[Path]:
    """Files that a module imports, now or when it is called, and not only for its types."""
    names = set()
    todo = list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        todo += ast.iter_child_nodes(node)
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return {file for file in files if file.is_file() and file.parent.name in SHAPING}


@pytest.mark.parametrize(
    "name", ["download", "validate", "preprocess", "train", "evaluate", "export", "cross_validate"]
)
def test_a_stage_runs_again_when_code_it_imports_changes(name):
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]
    deps = {ROOT / dep for dep in stage.get("do", stage)["deps"]}
    seen, todo = set(), {ROOT / "distilldsm" / "components" / f"{name}.py"}
    while todo:
        seen |= todo
        todo = set().union(*map(imported, todo)) - seen
    missing = {file.relative_to(ROOT).as_posix() for file in seen if not deps & {file, *file.parents}}
    assert missing == set()
