"""The voxels that a machine sees in a time."""

from __future__ import annotations

import re

import pytest

from distilldsm.cli.main import main
from distilldsm.core.errors import ConfigError
from distilldsm.core.progress import seconds_of
from distilldsm.training import speed
from distilldsm.training.loop import Trainer
from tests.training.test_train_stage import config


def test_steps_after_the_warm_up_are_counted(preprocessed, tmp_path, monkeypatch):
    """A clock on which a step takes half a second, and the first two ten: four steps of 2 x 10 x 32 x 32 voxels."""
    made = Trainer(config(samples_per_case=100), preprocessed=preprocessed, work=tmp_path, fold=0)
    now, sizes = [0.0], []

    def step(images, labels, size, epoch, number) -> float:
        now[0] += 10.0 if number < 2 else 0.5
        sizes.append(size)
        return 0.0

    monkeypatch.setattr(made, "step", step)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    found = speed.voxels_per_second(made, 2.0)
    assert len(sizes) == 6
    assert found == pytest.approx(sum(2 * d * h * w for d, h, w in sizes[2:]) / 2.0)


def test_the_command_prints_a_parameter(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "voxels_per_second", lambda trainer, measured_s: 500_000.0 * measured_s)
    arguments = ["--params", str(tmp_path / "none.yaml"), "--set", "train.model.options={width: 0.25}"]
    assert main(["budget", "60 min", "--seconds", "1", *arguments]) == 0
    assert re.search(r"^train\.budget=1\.6e\+09$", capsys.readouterr().out, re.MULTILINE)
    assert main(["budget", "an hour", *arguments]) == 2
    assert "TIME: is not a time" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("60 min", 3600), ("1.5h", 5400), (" 90 s ", 90)])
def test_times(text, seconds):
    assert seconds_of(text, where="x") == seconds


@pytest.mark.parametrize("text", ["60", "min", "0 min", "-1 h", "1 min 2 s", ""])
def test_what_is_no_time(text):
    with pytest.raises(ConfigError, match="is not a time"):
        seconds_of(text, where="x")
