"""The mean of several networks of a fold: what is predicted, scored, summed up, tracked and refused."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from distilldsm.cli.main import main
from distilldsm.components.evaluate import STAGE, run
from distilldsm.config import EvaluateConfig, ModelConfig, PreprocessConfig, TrackingConfig, TrainConfig
from distilldsm.core.cost import ensemble_cost, training_cost
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.geometry import mask_of, to_network_space
from distilldsm.data.preprocess import preprocess_dataset
from distilldsm.data.targets import softmax
from distilldsm.export.scores import collect_scores
from distilldsm.inference.loading import load_trained
from distilldsm.io import read_scan
from tests.data.volumes import write_dataset

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = {"a": ("distill_dsm", 0), "b": ("distill_dsm", 1), "c": ("unet2d", 0)}
"""Folder below `runs` to the network and the seed of its training."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two folds of a data set and models of NETWORKS (of `c`: fold 0 only), where `cross-validate` puts them."""
    from distilldsm.components.train import run as train

    root = tmp_path_factory.mktemp("ensemble")
    index = write_dataset(root / "data/raw", cases=4)
    preprocess_dataset(root / "data/raw", index, PreprocessConfig(folds=2, workers=1), root / "data/preprocessed")
    for folder, (name, seed) in NETWORKS.items():
        config = TrainConfig(
            model=ModelConfig(name=name, options={"width": 0.25}), epochs=1, batch_size=2, seed=seed, validate_every=9
        )
        for fold in (0, 1) if folder != "c" else (0,):
            model = root / "runs" / folder / "models" / f"fold{fold}"
            inputs = {"preprocessed": root / "data/preprocessed"}
            train(config, inputs, {"model": model}, fold=fold, tracking=TrackingConfig(enabled=False))
    return root


@pytest.fixture
def inputs(place) -> dict[str, Path]:
    data = place / "data"
    return {"dataset": data / "raw", "preprocessed": data / "preprocessed", "model": model(place, "a")}


def model(place: Path, name: str, fold: int = 0) -> Path:
    return place / "runs" / name / "models" / f"fold{fold}"


def test_masks_are_those_of_the_mean_of_the_probabilities(place, inputs):
    folders = [model(place, name) for name in "abc"]
    alone = [load_trained(folder) for folder in folders]
    together = load_trained(folders[0], ensemble=folders[1:])
    differ = 0
    for case in DatasetIndex.load(inputs["dataset"]).cases:
        scan = read_scan([inputs["dataset"] / path for path in case.images], 1)
        image, record = to_network_space(scan, together.plan)
        probabilities = [softmax(one.logits(image)) for one in alone]
        expected = mask_of(np.mean(probabilities, axis=0), record, together.plan)
        mask = together.predict(scan).mask
        assert (mask == expected).mean() > 0.999
        differ += sum((mask != one.predict(scan).mask).any() for one in alone)
    assert differ, "a mean that is any one's mask shows nothing"
    assert together.network.depth_halo == max(one.network.depth_halo for one in alone)


def test_scores_costs_and_page_are_those_of_all_networks(place, inputs, tmp_path):
    others = [model(place, "b"), model(place, "c")]
    run(EvaluateConfig(workers=1), inputs, {"evaluation": tmp_path / "e"}, fold=0, ensemble=others)
    summary, timing = read_json(tmp_path / "e/summary.json"), read_json(tmp_path / "e/timing.json")
    assert [(one["name"], one["train"]["seed"]) for one in summary["ensemble"].values()] == list(NETWORKS.values())
    each = [training_cost(one) for one in (inputs["model"], *others)]
    for key in ("parameters", "macs_per_voxel", "seconds", "epochs"):
        assert timing["training"][key] == pytest.approx(sum(one[key] for one in each)), key
    assert timing["training"]["peak_memory_gb"] == max(one["peak_memory_gb"] for one in each)
    page = (tmp_path / "e/report.html").read_text()
    assert "Predictions are the average of 3 networks" in page
    assert "2 \u00d7 distill_dsm (width=0.25) + unet2d (width=0.25)" in page
    assert f"{sum(one['parameters'] for one in each):,} parameters" in page
    # Neither the champion's gate nor the post-processing of one network goes by the scores of several.
    scores = collect_scores(
        inputs["model"], inputs["preprocessed"], tmp_path / "e", fold=0, checkpoint=EvaluateConfig().checkpoint
    )
    assert (scores.source, scores.note) == ("validation", "the evaluation is of this network and others, averaged")


def test_costs_of_trainings_on_different_machines_name_none(tmp_path):
    for name, device, memory in (("a", "one", None), ("b", "another", 2.0)):
        (tmp_path / name).mkdir()
        cost = {"parameters": 10, "seconds": 1.5, "seconds_per_epoch": 0.5, "peak_memory_gb": memory, "device": "cpu"}
        write_json(tmp_path / name / "cost.json", cost | {"device_name": device})
    assert ensemble_cost([tmp_path / "a", tmp_path / "b"]) == {
        "parameters": 20,
        "seconds": 3.0,
        "seconds_per_epoch": 0.5,
        "peak_memory_gb": 2.0,
        "device": "cpu",
    }


def test_what_cannot_be_averaged_is_refused(place, inputs, tmp_path):
    def refused(*others: Path, match: str) -> None:
        with pytest.raises(DataError, match=match):
            run(EvaluateConfig(workers=1), inputs, {"evaluation": tmp_path / "e"}, fold=0, ensemble=others)
        assert not (tmp_path / "e").exists()

    copied = Path(shutil.copytree(inputs["model"], tmp_path / "copied"))
    refused(model(place, "b"), copied, match=r"copied: is in the ensemble twice(.|\n)*train\.seed")
    refused(model(place, "b", fold=1), match=r"model\.json: is the model of another fold")
    other = Path(shutil.copytree(model(place, "b"), tmp_path / "other"))
    write_json(other / "plan.json", read_json(other / "plan.json") | {"target_spacing_mm": [9.0, 1.0, 1.0]})
    refused(other, match=r"other: does not fit into the ensemble: it has another spacing")


@pytest.mark.slow
def test_one_command_scores_all_folds_and_tracks_them(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("distilldsm.pipeline.all_folds.Folds.prepare", lambda self: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (place / "params.yaml").write_text(yaml.safe_dump({"evaluate": {"workers": 1}}))
    command = ["cross-validate", "--ensemble", "runs/a", "runs/b", "--output"]
    with contextlib.chdir(place):
        assert main([*command, "runs/ab"]) == 0
        table = capsys.readouterr().out
        assert "cross-validation: folds 0, 1, 4 cases" in table
        assert "networks, averaged: 2 distill_dsm\n" in table
        assert not (place / "runs/ab/models").exists(), "nothing is trained"
        assert main([*command, "runs/ab"]) == 0
        assert capsys.readouterr().out.count("evaluate: up to date") == 2
        page = (place / "runs/ab/cross_validation/report.html").read_text()
        assert "2 \u00d7 distill_dsm (width=0.25), folds 0, 1" in page
        cost = read_json(place / "runs/ab/cross_validation/summary.json")["cost"]
        assert cost["parameters"] == 2 * read_json(model(place, "a") / "model.json")["parameters"]
        for words, seen in (
            ([*command, "runs/a"], "an ensemble needs its own folder"),
            ([*command, "."], "an ensemble needs its own folder"),
            (["cross-validate", "--ensemble", "runs/a", "--output", "runs/x"], "names one folder"),
            (["cross-validate", "--ensemble", "runs/a", "runs/none", "--output", "runs/x"], "holds no models"),
        ):
            assert main(words) != 0
            assert seen in capsys.readouterr().err
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = [one for one in client.search_experiments() if one.name == TrackingConfig().experiment]
    runs = {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"ensemble-fold0", "ensemble-fold1", "ensemble-cv2"}
    parent, child = runs["ensemble-cv2"], runs["ensemble-fold0"]
    assert {runs[f"ensemble-fold{k}"].data.tags["mlflow.parentRunId"] for k in (0, 1)} == {parent.info.run_id}
    assert child.data.params["ensemble.2.train.seed"] == parent.data.params["ensemble.2.train.seed"] == "1"
    assert child.data.metrics["test_dice_mean"] == pytest.approx(
        read_json(place / "runs/ab/evaluation/fold0/summary.json")["mean"]["dice"]
    )
    assert child.info.status == "FINISHED"


def test_the_key_names_every_model(place, inputs):
    """Else another second network would be taken for evaluated."""
    keys = [STAGE.key(EvaluateConfig(), inputs, 0, ensemble=[model(place, name)])["inputs"] for name in "bc"]
    assert keys[0] != keys[1] != STAGE.key(EvaluateConfig(), inputs, 0)["inputs"]
