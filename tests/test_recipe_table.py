"""The table that benchmarks/recipe.py keeps."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from types import SimpleNamespace

from benchmarks.recipe import compare_variants, keep, stage
from tests.evaluation.test_comparison import random_cases, write_fold


def row(fold: int, **scores: float) -> dict:
    return {"variant": "base", "fold": fold, **scores, "overrides": "train.epochs=2"}


def test_rows_of_other_labels_keep_their_columns_and_none_is_told_twice(tmp_path):
    path = tmp_path / "results.csv"
    keep(path, row(0, dice_Anterior=0.8))
    keep(path, row(0, dice_RV=0.7, dice_LV=0.9) | {"overrides": "dataset=acdc"})
    keep(path, row(1, dice_Anterior=0.6))
    keep(path, row(1, dice_Anterior=0.65))
    with open(path, newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [(r["fold"], r["dice_Anterior"], r["dice_RV"], r["dice_LV"]) for r in found] == [
        ("0", "0.8", "", ""),
        ("0", "", "0.7", "0.9"),
        ("1", "0.65", "", ""),
    ]


def test_what_two_variants_share_is_made_once(tmp_path, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        sleep(0.05)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "manifest.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("benchmarks.recipe.subprocess.run", run)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: stage(tmp_path, "train", [], tmp_path / "model", 1), range(8)))
    assert len(calls) == 1


def test_folds_that_end_together_are_all_kept(tmp_path):
    path = tmp_path / "results.csv"
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda fold: keep(path, row(fold, dice=0.5)), range(64)))
    with open(path, newline="") as stream:
        assert sorted(int(r["fold"]) for r in csv.DictReader(stream)) == list(range(64))


def test_variants_are_compared_with_the_first(tmp_path):
    names = [f"c{k}" for k in range(6)]
    folders = {name: write_fold(tmp_path / name, random_cases(names, seed)) for seed, name in enumerate(("a", "b"))}
    text = compare_variants({name: [folder] for name, folder in folders.items()}, tmp_path)
    assert "p (Holm)" in text
    with open(tmp_path / "comparison.csv", newline="") as stream:
        assert {(row["training"], row["cases"]) for row in csv.DictReader(stream)} == {("a", "6"), ("b", "6")}
    assert (tmp_path / "comparison.png").stat().st_size > 1000
