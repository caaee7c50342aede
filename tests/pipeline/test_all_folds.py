"""`distilldsm cross-validate`: every fold trained, evaluated and summed up, resumed, and stopped where one fails."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from distilldsm.cli.main import main
from distilldsm.components.registry import find
from distilldsm.core.files import read_json, write_json
from distilldsm.pipeline import all_folds
from tests.data.volumes import write_dataset

ROOT = Path(__file__).resolve().parents[2]


TRAIN = {"model": {"name": "distill_dsm", "options": {"width": 0.25}}, "epochs": 1, "batch_size": 2}
PARAMS = {
    "validate": {"suite": str(ROOT / "conf/expectations.yaml"), "workers": 1},
    "preprocess": {"folds": 2, "workers": 1},
    "train": TRAIN,
    "tracking": {"enabled": False},
    "evaluate": {"workers": 1},
}
DESCRIPTION = {
    "name": "Ellipsoids",
    "channel_names": {"0": "T1"},
    "labels": {"background": 0, "shell": 1, "core": 2},
    "numTraining": 4,
    "file_ending": ".nii.gz",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A tiny data set in nnU-Net's layout, its parameters, and the stages that all folds share."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "given").mkdir()
    write_dataset(root / "given", cases=4)
    write_json(root / "given/dataset.json", DESCRIPTION)
    # An absolute path: a copy of the data would be newer than what was made of them.
    source = {"download": {"source": str(root / "given")}}
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS | source))
    with contextlib.chdir(root):
        assert [main([stage]) for stage in ("download", "validate", "preprocess")] == [0, 0, 0]
    return root


@pytest.fixture
def place(prepared, tmp_path, monkeypatch) -> Path:
    """The current directory: the data set is preprocessed, nothing is trained."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def times(place: Path) -> dict[str, int]:
    return {str(p.relative_to(place)): p.stat().st_mtime_ns for p in place.glob("*/fold*/manifest.json")}


@pytest.mark.slow
def test_all_folds_and_again_only_what_is_missing(place, capsys):
    assert main(["cross-validate", "--jobs", "2", "--set", "train.samples_per_case=2"]) == 0
    out = capsys.readouterr().out
    assert "fold 0 | epoch 1/1" in out
    assert "fold 1 | evaluate: 2 cases" in out
    assert "cross-validation: folds 0, 1, 4 cases" in out
    assert {"summary.json", "report.html", "table.csv"} <= {p.name for p in (place / "cross_validation").iterdir()}
    threads = read_json(place / "models/fold0/cost.json")["threads"]
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2), "two at a time share the cores"
    before = times(place)
    assert len(before) == 4
    (place / "evaluation/fold1/cases.csv").unlink()
    assert main(["cross-validate", "--set", "train.samples_per_case=2"]) == 0
    after = times(place)
    assert [name for name in after if after[name] != before[name]] == ["evaluation/fold1/manifest.json"]
    assert "fold 1 | train: up to date" in capsys.readouterr().out
    for name in ("models", "evaluation"):
        shutil.copytree(place / name, place / "runs/first" / name)
    assert main(["cross-validate", "--set", "train.samples_per_case=2", "--output", "runs/first"]) == 0
    said = capsys.readouterr().out
    assert said.count("up to date") == 3 + 4, "of the data and of two folds"
    assert (place / "runs/first/cross_validation/summary.json").is_file()
    assert main(["summary"]) == 0
    shown = capsys.readouterr().out
    assert "cross_validation: folds 0, 1, 4 cases" in shown
    assert "seconds per volume" in shown
    (place / "evaluation/fold1/manifest.json").write_text('{"files": {}}')
    assert main(["summary"]) == 0
    assert "over 2 folds" in capsys.readouterr().out, "a table older than a fold is not shown"


def test_another_output_folder_reaches_the_stages():
    command = all_folds.Folds(["--params", "p.yaml"], jobs=1, output=Path("runs/b")).command
    for stage, options in (
        ("train", ["--output", "runs/b/models/fold3"]),
        ("evaluate", ["--model", "runs/b/models/fold3", "--output", "runs/b/evaluation/fold3"]),
    ):
        assert command(find(stage), 3)[3:] == ["--params", "p.yaml", "--fold", "3", *options]


def test_what_cannot_be(place, capsys):
    assert main(["cross-validate", "--folds", "0", "2"]) == 1
    captured = capsys.readouterr()
    assert "there is no such fold" in captured.err
    assert captured.out.splitlines() == ["download: up to date", "validate: up to date", "preprocess: up to date"]
    assert main(["cross-validate", "--set", "train.epoch=3"]) == 2
    assert main(["cross-validate", "--jobs", "0"]) == 2
    assert "--jobs: is too small\n  seen: 0\n  rule: 1 or more" in capsys.readouterr().err
    assert not (place / "models").exists()


@pytest.mark.slow
def test_the_data_are_made_as_far_as_they_are_not_there(place, monkeypatch, capsys):
    made = {stage: place / "data" / stage / "manifest.json" for stage in ("raw", "validation", "preprocessed")}
    before = {name: path.stat().st_mtime_ns for name, path in made.items()}
    monkeypatch.setattr(all_folds.Folds, "run", lambda self, folds: print("folds", folds) or sys.exit(0))

    def cross_validate(*arguments: str) -> set[str]:
        """The data that were made anew."""
        with pytest.raises(SystemExit):
            main(["cross-validate", "--jobs", "2", *arguments])
        return {name for name, path in made.items() if before.get(name) != path.stat().st_mtime_ns}

    assert cross_validate("--set", "preprocess.workers=2") == set(), "where it is computed changes nothing"
    assert cross_validate("--set", "preprocess.folds=4") == {"preprocessed"}
    assert read_json(made["preprocessed"])["config"]["folds"] == 4, "--set reaches the stage"
    assert "4 cases; depth axis" in (place / "logs/cross_validation/preprocess.log").read_text()
    shutil.rmtree(place / "data")
    assert cross_validate() == set(made)
    assert capsys.readouterr().out.rstrip().endswith("folds [0, 1]")


def test_bad_data_stop_before_any_training(place, prepared, capsys):
    (place / "given/labelsTr/case_00.nii.gz").write_bytes(b"no volume")
    params = (place / "params.yaml").read_text()
    (place / "params.yaml").write_text(params.replace(str(prepared / "given"), str(place / "given")))
    assert main(["cross-validate"]) == 1
    captured = capsys.readouterr()
    assert "validate failed, exit code 1" in captured.err
    assert "logs/cross_validation/validate.log" in captured.err
    assert "case_00.nii.gz" in captured.out, "what the stage said is shown"
    assert not (place / "models").exists()


STAND_IN = """
import signal, sys, time
from distilldsm.core.shell import interrupt
signal.signal(signal.SIGTERM, interrupt)
stage, fold = sys.argv[1:]
if fold == "1":
    print("reading"); print("error: the scan is bad"); print("  hint: replace it"); sys.exit(2)
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted"); sys.exit(130)
"""


@pytest.fixture
def stand_in(monkeypatch) -> list[str]:
    """Stages of fold 1 fail, those of others take a minute."""
    started: list[str] = []

    def command(self, stage, fold):
        started.append(f"{stage.name} {fold}")
        return [sys.executable, "-c", STAND_IN, stage.name, str(fold)]

    monkeypatch.setattr(all_folds.Folds, "command", command)
    return started


def test_a_failing_fold_stops_the_others_and_names_its_log(place, stand_in, monkeypatch, capsys):
    monkeypatch.setattr(all_folds.Folds, "prepare", lambda self: None)
    began = time.monotonic()
    assert main(["cross-validate", "--jobs", "2"]) == 2
    assert time.monotonic() - began < 40
    captured = capsys.readouterr()
    assert "fold 1: train failed, exit code 2" in captured.err
    assert "logs/cross_validation/fold1-train.log" in captured.err
    assert "the scan is bad" in captured.err
    assert "fold 1 | reading" in captured.out
    assert sorted(stand_in) == ["train 0", "train 1"]
    assert not (place / "cross_validation").exists()


def test_after_a_failure_nothing_more_is_started(place, stand_in):
    folds = all_folds.Folds([], jobs=1)
    with pytest.raises(all_folds.UserError, match="fold 1"):
        folds.run([1, 0])
    assert stand_in == ["train 1"]


@pytest.mark.parametrize(
    ("begin", "started", "log"),
    [
        (lambda folds: folds.run([0, 2]), "train 0", "fold0-train.log"),
        (lambda folds: folds.prepare(), "download None", "download.log"),
    ],
    ids=["folds", "data"],
)
def test_an_interrupt_reaches_the_stages(place, stand_in, monkeypatch, begin, started, log):
    folds = all_folds.Folds([], jobs=1)

    def interrupted(tasks):
        while not folds._running:
            time.sleep(0.01)
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(all_folds, "wait", interrupted)
    stop = all_folds.Folds._stop
    monkeypatch.setattr(all_folds.Folds, "_stop", lambda self, patience_s=0.0: stop(self, min(patience_s, 0.1)))
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        begin(folds)
    assert not folds._running
    assert stand_in == [started]
    assert "interrupted" in (Path("logs/cross_validation") / log).read_text()
    assert threading.active_count() <= threads
