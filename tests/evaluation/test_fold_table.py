"""The statistics over folds and cases, against pandas; folds that do not belong together."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pandas as pd
import pytest

from distilldsm.config import EvaluateConfig, ModelConfig, TrainConfig
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.evaluation import fold_table as table
from distilldsm.evaluation import tables
from distilldsm.evaluation.costs import machines
from distilldsm.evaluation.folds import CASES_POSTPROCESSED, load_folds, read_rows
from distilldsm.evaluation.metrics import METRICS
from distilldsm.evaluation.postprocess import write_postprocessing
from distilldsm.evaluation.trainings import load_training
from tests.evaluation.folds import cross_validated, random_rows, write_fold, write_folds, write_splits


def load(root, splits=None, numbers=(0, 1, 2)):
    return load_folds(numbers, root / "evaluation", root / "models", splits)


def same(value, expected) -> bool:
    return value is None if math.isnan(expected) else value == pytest.approx(expected)


def test_statistics_are_those_of_pandas(tmp_path):
    splits, rows = write_folds(tmp_path)
    undefined = [{**row, "precision": None} for row in rows[1]]  # in a fold no precision at all
    write_fold(tmp_path, 1, undefined, splits=splits, seconds=3.0)
    summary = table.summarise(load(tmp_path, splits))
    frame = pd.concat([pd.DataFrame(one).assign(fold=fold) for fold, one in enumerate([rows[0], undefined, rows[2]])])
    frame = frame.astype(dict.fromkeys(("sensitivity", "precision"), float))
    frame["volume_error_abs_ml"] = frame["volume_error_ml"].abs()
    for label, of_label in frame.groupby("label"):
        for metric in METRICS:
            entry = summary["labels"][label][metric]
            means = of_label.groupby("fold")[metric].mean()
            assert same(entry["mean_folds"], means.mean())
            assert same(entry["sd_folds"], means.std(ddof=1))
            assert entry["folds"] == means.count()
            assert same(entry["mean_cases"], of_label[metric].mean())
            assert same(entry["sd_cases"], of_label[metric].std(ddof=1))
            assert entry["cases"] == of_label[metric].count()
            assert all(same(entry["fold_means"][str(fold)], mean) for fold, mean in means.items())
    for metric in METRICS:
        of_folds = frame.groupby(["fold", "label"])[metric].mean().groupby("fold").mean()
        of_cases = frame.groupby("case")[metric].mean()
        entry = summary["mean"][metric]
        assert same(entry["mean_folds"], of_folds.mean())
        assert same(entry["sd_folds"], of_folds.std(ddof=1))
        assert same(entry["mean_cases"], of_cases.mean())
        assert same(entry["sd_cases"], of_cases.std(ddof=1))
    assert summary["labels"]["core"]["precision"]["folds"] == 2
    assert summary["labels"]["core"]["precision"]["fold_means"]["1"] is None
    assert summary["cases"] == 4 + 5 + 6
    assert summary["largest_component"] is None, "no case has a second component"


def test_costs_are_medians_and_peaks(tmp_path):
    write_folds(tmp_path)
    cost = table.summarise(load(tmp_path))["cost"]
    assert (cost["parameters"], cost["macs_per_voxel"]) == (1000, 12.5)
    assert (cost["seconds_per_epoch"], cost["seconds_per_volume"]) == (3.0, pytest.approx(0.3))
    assert (cost["training_gb"], cost["prediction_gb"], cost["training_gpu_gb"]) == (2.5, 0.25, None)
    assert [row["seconds_per_epoch"] for row in cost["folds"]] == [2.0, 3.0, 4.0]
    assert cost["machines"] == ["a CPU, threads: 2, float32, torch 2", "a CPU, threads: 2, torch 2"]
    assert machines([{"device": "cuda", "device_name": "a GPU", "torch": "2"}] * 2) == ["a GPU, cuda, torch 2"]
    titles = [title for title, _ in table.cost_lines(table.summarise(load(tmp_path)))]
    assert "peak memory of training, GB" in titles
    assert not any("GPU" in title for title in titles), "what was not measured is left out"


def test_one_fold_has_no_standard_deviation_over_folds(tmp_path):
    splits, _ = write_folds(tmp_path)
    summary = table.summarise(load(tmp_path, splits, numbers=(1,)))
    assert summary["labels"]["core"]["dice"]["sd_folds"] is None
    assert summary["labels"]["core"]["dice"]["sd_cases"] > 0
    assert "sd_folds" not in table.metrics_for_dvc(summary)["dice"]["core"]
    assert "cv_dice_core_mean" in table.metrics_for_mlflow(summary)
    assert "folds 1, 5 cases" in table.format_table(summary, "x")


def test_every_case_is_held_out_once(tmp_path):
    splits, rows = write_folds(tmp_path)
    write_fold(tmp_path, 1, [*rows[1], *rows[0][:2]], splits=splits)
    with pytest.raises(DataError, match=r"held out in two folds\n  seen: case00, also in fold 0"):
        load(tmp_path)
    write_fold(tmp_path, 1, rows[1][2:], splits=splits)
    load(tmp_path)  # not all of the cases: only the split tells
    with pytest.raises(DataError, match=r"not the held-out cases(.|\n)*1 differ, first case10"):
        load(tmp_path, splits)
    write_fold(tmp_path, 1, [*rows[1], rows[1][0]], splits=splits)
    with pytest.raises(DataError, match="scored twice"):
        load(tmp_path)


def test_a_split_that_has_changed(tmp_path):
    splits, _ = write_folds(tmp_path)
    stored = read_json(splits)
    write_json(splits, {"folds": [*stored["folds"], {"train": [], "held_out": []}]})
    with pytest.raises(DataError, match="evaluated with another split"):
        load(tmp_path, splits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": TrainConfig(model=ModelConfig(name="unet2d", options={}))}, "another network(.|\n)*name: unet2d"),
        ({"network": {"parameters": 7}}, "another network(.|\n)*parameters: 7; in fold 0: 1000"),
        ({"train": TrainConfig(epochs=7)}, "other parameters of the training(.|\n)*epochs: 7"),
        ({"evaluate": EvaluateConfig(nsd_tolerance_mm=2)}, "other parameters of the evaluation(.|\n)*tolerance_mm: 2"),
        ({"data": "other"}, "other preprocessed data"),
        ({"initial_weights": "of another training"}, "other initial weights"),
        ({"network": {"splits": "another"}}, "evaluated with another split than its model was trained on"),
    ],
)
def test_folds_that_do_not_belong_together(tmp_path, changes, words):
    splits, rows = write_folds(tmp_path)
    write_fold(tmp_path, 2, rows[2], splits=splits, **changes)
    with pytest.raises(DataError, match=words):
        load(tmp_path)
    assert load(tmp_path, numbers=(0, 1)), "a fold that is not asked for does not matter"


def test_where_it_was_computed_may_differ(tmp_path):
    splits, rows = write_folds(tmp_path)
    write_fold(tmp_path, 2, rows[2], splits=splits, train=TrainConfig(device="cpu", workers=3))
    assert load(tmp_path)


def test_other_splits_labels_and_models(tmp_path):
    splits, rows = write_folds(tmp_path)
    other = write_splits(tmp_path / "other", [["a"], ["b"], ["c"]])
    write_fold(tmp_path, 2, rows[2], splits=other)
    with pytest.raises(DataError, match="another data set or split"):
        load(tmp_path)
    write_fold(tmp_path, 2, random_rows(["c"], 0, ("shell",)), splits=splits)
    with pytest.raises(DataError, match="other labels"):
        load(tmp_path)
    write_fold(tmp_path, 2, rows[2], splits=splits)
    manifest = tmp_path / "models" / "fold2" / "manifest.json"
    write_json(manifest, {**read_json(manifest), "files": {"last.safetensors": "trained again"}})
    with pytest.raises(DataError, match="evaluated with another model"):
        load(tmp_path)


def test_folds_that_are_missing_or_damaged(tmp_path):
    splits, rows = write_folds(tmp_path)
    with pytest.raises(DataError, match=r"fold 4 is missing(.|\n)*train --fold 4"):
        load(tmp_path, numbers=(0, 4))
    (tmp_path / "evaluation" / "fold0").rename(tmp_path / "evaluation" / "fold5")
    (tmp_path / "models" / "fold0").rename(tmp_path / "models" / "fold5")
    with pytest.raises(DataError, match="contains another fold"):
        load(tmp_path, numbers=(5,))
    cases = tmp_path / "evaluation" / "fold1" / "cases.csv"
    cases.write_text(cases.read_text().replace("dice", "dise"))
    with pytest.raises(DataError, match="lacks dice"):
        load(tmp_path, numbers=(1,))
    write_fold(tmp_path, 1, rows[1], splits=splits)
    cases.write_text(cases.read_text().replace("shell,0.", "shell,x0.", 1))
    with pytest.raises(DataError, match="not a number"):
        load(tmp_path, numbers=(1,))


def test_post_processing_is_reported_as_the_other_folds_decide(tmp_path):
    splits, rows = write_folds(tmp_path)
    gains = {0: -0.05, 1: 0.1, 2: 0.1}  # in Dice of the core: only the folds 1 and 2 would choose it
    for fold, of_fold in enumerate(rows):
        better = [
            {**row, "dice": row["dice"] + gains[fold], "hd95_mm": row["hd95_mm"] / 2, "volume_predicted_ml": 2.0}
            if row["label"] == "core"
            else row
            for row in of_fold
        ]
        tables.write_csv(tmp_path / "evaluation" / f"fold{fold}" / "postprocessed.csv", better)
    folds = load_folds([0, 1, 2], tmp_path / "evaluation", tmp_path / "models", splits)
    found = table.summarise(folds)["largest_component"]
    # Fold 0 is decided by 1 and 2 (both gain); 1 and 2 by fold 0 and another one: the mean over cases decides.
    expected = {}
    for fold in range(3):
        of_others = [gains[f] for f in range(3) if f != fold for row in rows[f] if row["label"] == "core"]
        expected[str(fold)] = ["core"] if statistics.fmean(of_others) > 1e-4 else []
    assert found["chosen"] == expected
    assert expected["0"] == ["core"]
    raw = [row["dice"] for row in rows[0] if row["label"] == "core"]
    mean = found["labels"]["core"]["dice"]["fold_means"]["0"]
    assert mean == pytest.approx(statistics.fmean(raw) + gains[0], abs=1e-6)  # reported though it lost there
    assert found["labels"]["shell"]["dice"] == table.summarise(folds)["labels"]["shell"]["dice"]
    assert found["mean"]["dice"]["fold_means"]["0"] == pytest.approx(
        (mean + found["labels"]["shell"]["dice"]["fold_means"]["0"]) / 2
    )
    summary = table.summarise(folds)
    line = next(one for one in table.format_table(summary, "t").splitlines() if one.startswith("mean, largest"))
    assert f"Dice {found['mean']['dice']['mean_folds']:.4f} ± {found['mean']['dice']['sd_folds']:.4f}" in line
    numbers = table.metrics_for_mlflow(summary)
    assert numbers["cv_postprocessed_dice_mean"] == round(found["mean"]["dice"]["mean_folds"], 5)
    cross_validated(tmp_path)
    written = {(r["case"], r["label"]): r["dice"] for r in read_rows(tmp_path / "cv" / CASES_POSTPROCESSED)}
    kept = {fold for fold, labels in expected.items() if labels}
    for fold, of_fold in enumerate(rows):
        for row in of_fold:
            gain = gains[fold] if row["label"] == "core" and str(fold) in kept else 0.0
            assert written[row["case"], row["label"]] == pytest.approx(row["dice"] + gain, abs=1e-5)
    comparable = load_training("cv", [tmp_path / "cv"], postprocessed=True)
    scores = comparable.scores
    for (case, label), dice in written.items():
        found = scores.select([case], [label]).scores["dice"]
        assert found == pytest.approx(np.array([[dice]]))


def test_nested_regions_are_post_processed_together(tmp_path):
    splits, rows = write_folds(tmp_path)
    gains = {"core": 0.1, "shell": -0.01}
    for fold, of_fold in enumerate(rows):
        better = [{**r, "dice": r["dice"] + gains[r["label"]], "volume_predicted_ml": 2.0} for r in of_fold]
        groups = {"core": ("core", "shell")}
        write_postprocessing(tmp_path / "evaluation" / f"fold{fold}", of_fold, better, groups)
    folds = load_folds([0, 1, 2], tmp_path / "evaluation", tmp_path / "models", splits)
    summary = table.summarise(folds)
    found = summary["largest_component"]
    assert found["chosen"] == {str(fold): ["core", "shell"] for fold in range(3)}
    for label, gain in gains.items():
        raw = summary["labels"][label]["dice"]["mean_cases"]
        assert found["labels"][label]["dice"]["mean_cases"] == pytest.approx(raw + gain, abs=1e-5)
    write_postprocessing(tmp_path / "evaluation" / "fold1", rows[1], rows[1])
    with pytest.raises(DataError, match=r"fold 1 has another post-processing(.|\n)*tried.core"):
        load_folds([0, 1, 2], tmp_path / "evaluation", tmp_path / "models", splits)


def test_folds_of_different_ensembles_are_not_one_cross_validation(tmp_path):
    write_folds(tmp_path, count=2)
    both = {"1": {"name": "unet2d", "options": {}, "train": {"seed": 0, "workers": 1}}}
    for fold, others in enumerate(({"2": {"train": {"seed": 1, "workers": 1}}}, {"2": {"train": {"seed": 2}}})):
        path = tmp_path / f"evaluation/fold{fold}/summary.json"
        write_json(path, read_json(path) | {"ensemble": both | others})
    with pytest.raises(DataError, match=r"another ensemble(.|\n)*2\.train\.seed: 2; in fold 0: 1"):
        load(tmp_path, numbers=(0, 1))
    write_json(path, read_json(path) | {"ensemble": both | {"2": {"train": {"seed": 1, "workers": 4}}}})
    assert len(load(tmp_path, numbers=(0, 1))) == 2, "workers change no result"
    write_json(path, {k: v for k, v in read_json(path).items() if k != "ensemble"})
    with pytest.raises(DataError, match="another ensemble"):
        load(tmp_path, numbers=(0, 1))
