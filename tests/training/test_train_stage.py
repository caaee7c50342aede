"""Training runs, resumes to the same weights, stops on nonsense, and shares its work among processes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import distilldsm.training.loop as loop
from distilldsm.cli.main import main
from distilldsm.components.train import run
from distilldsm.config import AugmentConfig, ModelConfig, TrackingConfig, TrainConfig
from distilldsm.core import cost, progress
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.core.mapping import to_mapping
from distilldsm.data import plan_rules
from distilldsm.data.dataset import SAMPLE_SOURCE, DatasetIndex
from distilldsm.data.plan import Plan
from distilldsm.models.checkpoint import load_network
from distilldsm.training import continuation
from distilldsm.training.distributed import Processes
from distilldsm.training.loading import batches
from distilldsm.training.loop import Trainer
from distilldsm.training.schedule import learning_rate_at
from distilldsm.training.setup import Settings, choose_device

ROOT = Path(__file__).resolve().parents[2]
SMALL = ModelConfig(name="distill_dsm", options={"width": 0.25})
NO_TRACKING = TrackingConfig(enabled=False)


def config(**changes) -> TrainConfig:
    values = {"model": SMALL, "epochs": 3, "validate_every": 2, "batch_size": 2, "checkpoint_minutes": 0.0}
    values |= {"foreground_oversampling": 0.33, "ema_decay": 0.98}
    return TrainConfig(**{**values, "learning_rate": 0.01, **changes})


def train(preprocessed: Path, model: Path, settings: TrainConfig) -> dict[str, torch.Tensor]:
    run(settings, {"preprocessed": preprocessed}, {"model": model}, fold=0, tracking=NO_TRACKING)
    return load_file(model / "last.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns(preprocessed, tmp_path):
    train(preprocessed, tmp_path / "m", config(epochs=5, validate_every=2, samples_per_case=8, learning_rate=0.03))
    history = json.loads((tmp_path / "m" / "history.json").read_text())
    assert [h["epoch"] for h in history] == list(range(1, 6))
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[-1]["val_dice"]["shell"] > 0.7
    assert [h["epoch"] for h in history if "val_dice" in h] == [2, 4, 5]
    assert [h["epoch"] for h in history if "train_dice_mean" in h] == [5]
    assert history[-1]["train_dice"]["shell"] > 0.7
    files = {p.name for p in (tmp_path / "m").iterdir()}
    assert {"last.safetensors", "best.safetensors", "model.json", "plan.json", "manifest.json", "cost.json"} <= files
    assert loop.RESUME not in files
    network = load_network(tmp_path / "m")
    assert (
        sum(p.numel() for p in network.parameters())
        == json.loads((tmp_path / "m" / "model.json").read_text())["parameters"]
    )


def test_it_says_how_many_steps_and_whether_they_are_few(preprocessed, tmp_path, capsys, monkeypatch):
    train(preprocessed, tmp_path / "m", config(epochs=1))
    told = capsys.readouterr()
    assert told.out.splitlines()[0].endswith("; 2 steps, 2 an epoch, 2 patches a step (plan: 4)")
    assert "train: 2 optimizer steps and 1 patches a case are few" in told.err
    assert "set train.epochs=null\n" in told.err
    monkeypatch.setattr(plan_rules, "FEW_STEPS", 2)
    monkeypatch.setattr(plan_rules, "FEW_PER_CASE", 1)
    train(preprocessed, tmp_path / "n", config(epochs=1))
    monkeypatch.undo()
    index = DatasetIndex.load(preprocessed)
    monkeypatch.setattr(DatasetIndex, "load", lambda _: replace(index, source=SAMPLE_SOURCE))
    train(preprocessed, tmp_path / "o", config(epochs=1))
    assert "few" not in capsys.readouterr().err


def test_the_plan_decides_what_is_null(preprocessed, tmp_path):
    """And what is set stays; the number of epochs makes up the plan's patches."""
    plan = Plan.load(preprocessed / "plan.json")
    values = {"model": SMALL, "batch_size": 2}

    def settings(**changes) -> Settings:
        return Trainer(TrainConfig(**values, **changes), preprocessed=preprocessed, work=tmp_path, fold=0).settings

    planned = plan.training
    made = settings()
    assert made.samples_per_case == planned.samples_per_case == 50
    assert made.epochs * 50 * 4 == pytest.approx(planned.patches, abs=100)
    assert made.validate_every == round(made.epochs / 8)
    for key in ("foreground_oversampling", "learning_rate", "ema_decay", "rotation_deg"):
        assert getattr(made, key) == getattr(planned, key)
    assert settings(samples_per_case=5).epochs == round(planned.patches / 20)
    own = {"epochs": 3, "foreground_oversampling": 0.0, "learning_rate": 0.1, "ema_decay": 0.0, "validate_every": 7}
    found = settings(**own, augment=AugmentConfig(rotation_deg=0.0))
    assert found == Settings(**own, samples_per_case=1, rotation_deg=0.0)


def test_a_finished_training_goes_on(preprocessed, tmp_path, monkeypatch):
    """From its last weights, with the rates that a training of the whole length would have had."""
    params = tmp_path / "params.yaml"
    values = {"train": to_mapping(config(epochs=2, samples_per_case=2)), "tracking": {"enabled": False}}
    params.write_text(json.dumps(values))
    arguments = ["train", "--params", str(params), "--preprocessed", str(preprocessed), "--output", str(tmp_path / "m")]
    assert main([*arguments, "--continue-for", "1 min"]) == 1, "there is nothing to go on with"
    assert main(arguments) == 0
    first = load_file(tmp_path / "m" / "last.safetensors")
    history = json.loads((tmp_path / "m" / "history.json").read_text())
    rates, begun = [], []
    original = Trainer.step

    def step(self, *batch):
        begun.append({k: v.clone() for k, v in self.network.state_dict().items()})
        rates.append(self.optimizer.param_groups[0]["lr"])
        return original(self, *batch)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(continuation.statistics, "median", lambda seconds: 20.0)
    assert main([*arguments, "--continue-for", "1 min"]) == 0  # .9 x 60 / 20: two epochs
    assert same(begun[0], first)
    assert len(rates) == 8
    whole = [
        learning_rate_at(k, total_steps=16, peak=0.01, schedule="one_cycle", warmup_fraction=0.2) for k in range(16)
    ]
    assert rates == pytest.approx(whole[8:])
    after = json.loads((tmp_path / "m" / "history.json").read_text())
    assert [h["epoch"] for h in after] == [1, 2, 3, 4]
    assert after[:2] == history
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["continued"]["epochs"] == 2
    assert (tmp_path / "m" / "best.safetensors").is_file()
    assert main(arguments) == 0
    assert len(rates) == 8, "the continued model is what these parameters make"
    assert main([*arguments, "--set", "train.seed=3", "--continue-for", "1 min"]) == 1


def test_the_axes_of_the_flips_are_written_down(preprocessed, tmp_path):
    train(preprocessed, tmp_path / "m", config(epochs=1, augment=AugmentConfig(mirror_axes=("width", "depth"))))
    assert json.loads((tmp_path / "m" / "model.json").read_text())["mirror_axes"] == ["width", "depth"]


def test_same_seed_same_weights_other_seed_other_weights(preprocessed, tmp_path):
    first = train(preprocessed, tmp_path / "a", config(epochs=1))
    assert same(first, train(preprocessed, tmp_path / "b", config(epochs=1)))
    assert not same(first, train(preprocessed, tmp_path / "c", config(epochs=1, seed=1)))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_interrupted_training_ends_with_the_same_weights(preprocessed, tmp_path, monkeypatch, capsys, optimizer):
    settings = config(epochs=4, optimizer=optimizer, schedule="plateau" if optimizer == "sgd" else "one_cycle")
    if optimizer == "sgd":  # the heads of lower levels go on where they were, too
        settings = replace(settings, deep_supervision=2)
    whole = train(preprocessed, tmp_path / "whole", settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    begin, end = r"epoch {}/4  loss \d\.\d{{4}}  lr \d\.\d\de-\d\d  \d+\.\d s", r"  about \d+ s left, [\d.]+ [MG]B"
    dice = r"  Dice shell [01]\.\d{4}  core [01]\.\d{4}  val_dice_mean=[01]\.\d{6}"
    for number, (line, rest) in enumerate(zip(lines, (end, dice + end, end, dice), strict=True), start=1):
        assert re.fullmatch(begin.format(number) + rest, line)
    original = Trainer._train_epoch
    monkeypatch.setattr(cost, "peak_memory_gb", lambda: 77.0)

    def interrupt(self, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(self, epoch)

    monkeypatch.setattr(Trainer, "_train_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(preprocessed, tmp_path / "m", settings)
    assert caught.value.__notes__ == ["train: 2 of 4 epochs are kept"]
    assert not (tmp_path / "m").exists()
    assert (tmp_path / ".m.partial" / loop.RESUME).exists()
    seen = []
    monkeypatch.setattr(cost, "peak_memory_gb", lambda: 1.0)
    monkeypatch.setattr(Trainer, "_train_epoch", lambda self, epoch: seen.append(epoch) or original(self, epoch))
    monkeypatch.setenv("DISTILLDSM_PROGRESS", "bar")
    monkeypatch.setattr(progress, "_DRAW_EVERY_SECONDS", 0.0)  # these epochs end before a second drawing is due
    resumed = train(preprocessed, tmp_path / "m", settings)
    assert seen == [2, 3]
    shown = capsys.readouterr().err
    assert re.search(r"\repoch 3/4: +\d+%\|.*/\d+ \[.*step.*, loss \d\.\d{4}, [\d.]+ [MG]B\]", shown)
    assert re.search(r"\repoch 4/4, validation: +0%", shown)
    assert "\nepoch 4/4  loss " in shown.replace("\r", "\n"), "the epoch's own line is whole"
    assert same(whole, resumed)
    taken = json.loads((tmp_path / "m" / "cost.json").read_text())
    seconds = [h["seconds"] for h in json.loads((tmp_path / "m" / "history.json").read_text())]
    assert (taken["epochs"], taken["starts"], taken["peak_memory_gb"]) == (4, 2, 77.0)
    assert taken["seconds_per_epoch"] == pytest.approx(np.median(seconds), abs=1e-3)
    assert taken["seconds"] == pytest.approx(sum(seconds), abs=0.1)
    assert taken["device_name"]
    history = [
        [
            {k: v for k, v in h.items() if "seconds" not in k}
            for h in json.loads((tmp_path / d / "history.json").read_text())
        ]
        for d in ("whole", "m")
    ]
    assert history[0] == history[1]


def test_a_resumed_training_keeps_its_batch_size(preprocessed, tmp_path, monkeypatch):
    """The schedule counts in its steps, but a batch of the plan's is fitted to the processes, which may change."""
    monkeypatch.setattr(Trainer, "_wrap", lambda self: self.network)
    settings = config(batch_size=None, schedule="poly", epochs=4)
    begun = Trainer(settings, preprocessed=preprocessed, work=tmp_path, fold=0)
    begun.state.batch_size, begun.state.epoch, begun.state.step = 2, 3, 6
    begun._save_resume()
    two = Trainer(settings, preprocessed=preprocessed, work=tmp_path, fold=0, processes=Processes(world=2))
    assert (two.sampler.batch_size, two.total_steps) == (2, 8)
    with pytest.raises(ConfigError, match="from the start of this training"):
        Trainer(settings, preprocessed=preprocessed, work=tmp_path, fold=0, processes=Processes(world=3))


def test_a_loss_that_is_not_finite_stops_before_the_step(preprocessed, tmp_path, monkeypatch):
    trainer = Trainer(config(), preprocessed=preprocessed, work=tmp_path, fold=0)
    before = {k: v.clone() for k, v in trainer.network.named_parameters()}
    monkeypatch.setattr(loop, "segmentation_loss", lambda logits, y, **_: logits.sum() * float("nan"))
    with pytest.raises(UserError, match=r"not finite(.|\n)*learning_rate"):
        trainer.run()
    assert all(torch.equal(before[k], v) for k, v in trainer.network.named_parameters())


def test_accumulation_gives_the_same_gradient_without_batch_statistics(preprocessed, tmp_path):
    """Two halves of a batch add up to the whole (3-D U-Net: GroupNorm; cross-entropy: a plain mean)."""
    gradients = []
    for accumulate in (1, 2):
        settings = config(
            model=ModelConfig(name="unet3d", options={"base_width": 2}),
            accumulate=accumulate,
            dice_weight=0.0,
            gradient_clip_norm=0.0,
            optimizer="sgd",
            momentum=0.9,
            precision="fp32",
        )
        trainer = Trainer(settings, preprocessed=preprocessed, work=tmp_path, fold=0)
        trainer.optimizer.step = lambda: None
        captured = {}
        trainer.optimizer.zero_grad = lambda set_to_none=True, t=trainer, c=captured: c.update(
            {k: p.grad.clone() for k, p in t.network.named_parameters()}
        )
        trainer.step(*trainer.sampler.batch(0, 0), 0, 0)
        gradients.append(captured)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)


def test_loader_processes_do_not_change_the_batches(preprocessed, tmp_path):
    trainer = Trainer(config(), preprocessed=preprocessed, work=tmp_path, fold=0)
    read = [list(batches(trainer.sampler, 0, workers, Processes())) for workers in (0, 2)]
    for a, b in zip(*read, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["unet2d", "residual_dsm", "unet3d"])
def test_every_network_trains(preprocessed, tmp_path, name):
    option = {"base_width": 2} if name == "unet3d" else {"width": 0.25}
    settings = config(model=ModelConfig(name=name, options=option), epochs=1, compile=False)
    assert train(preprocessed, tmp_path / "m", settings)


def test_impossible_requests(preprocessed, tmp_path, capsys):
    with pytest.raises(ConfigError, match="GPU"):
        if torch.cuda.is_available():
            raise ConfigError("no GPU test on a machine with a GPU")
        choose_device("cuda", 0)
    (tmp_path / "params.yaml").write_text("tracking: {enabled: false}")
    arguments = ["--params", str(tmp_path / "params.yaml"), "--output", str(tmp_path / "m")]
    assert main(["train", *arguments, "--preprocessed", str(tmp_path / "none")]) == 1
    assert main(["train", *arguments, "--preprocessed", str(preprocessed), "--fold", "9"]) == 1
    assert "no such fold" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_initial_weights_do_not_lie_in_what_is_replaced(preprocessed, tmp_path):
    train(preprocessed, tmp_path / "m", config(epochs=1))
    settings = config(epochs=1, initial_weights=str(tmp_path / "m" / "last.safetensors"))
    with pytest.raises(ConfigError, match=r"train\.initial_weights: lies in the stage's output"):
        train(preprocessed, tmp_path / "m", settings)
    train(preprocessed, tmp_path / "other", settings)


def test_data_that_are_replaced_while_it_trains_are_told(preprocessed, tmp_path, monkeypatch):
    data = Path(shutil.copytree(preprocessed, tmp_path / "data"))

    class Replaced(Trainer):
        def run(self):
            plan = data / "plan.json"
            plan.write_text(plan.read_text().replace('"crop_to_nonzero": true', '"crop_to_nonzero": false'))
            return super().run()

    monkeypatch.setattr(loop, "Trainer", Replaced)
    with pytest.raises(UserError, match="data: was replaced while train was reading it"):
        train(data, tmp_path / "m", config(epochs=1))
    assert not (tmp_path / "m").exists()


def test_training_needs_little_more_than_torch_and_numpy(preprocessed, tmp_path):
    """On a GPU machine that holds nothing else: no package that reads scans, tracks or exports."""
    code = """
import sys
for name in ("nibabel scipy mlflow openvino pandas matplotlib surface_distance requests great_expectations monai onnx "
             "ruamel hydra dvc psutil").split():
    sys.modules[name] = None
from distilldsm.cli.main import main
raise SystemExit(main(["train", *sys.argv[1:]]))
"""
    (tmp_path / "params.yaml").write_text("tracking: {enabled: false}\n")
    settings = ["train.epochs=1", "train.batch_size=2", "train.model.options.width=0.25"]
    arguments = [word for value in settings for word in ("--set", value)]
    arguments += ["--params", "params.yaml", "--preprocessed", str(preprocessed), "--output", "model"]
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "model" / "last.safetensors").is_file()


def test_a_killed_loader_is_told_wherever_the_program_is(preprocessed, tmp_path, monkeypatch):
    """PyTorch raises in the main thread, which is most of the time not where the batch is asked for."""
    import psutil

    trainer = loop.Trainer(config(epochs=2, workers=1), preprocessed=preprocessed, work=tmp_path, fold=0)
    step = trainer.step

    def kill_loader(*batch):
        for child in psutil.Process().children():
            child.kill()
        time.sleep(1)  # the signal comes while the step is computed
        return step(*batch)

    monkeypatch.setattr(trainer, "step", kill_loader)
    with pytest.raises(UserError, match=r"train\.workers: a worker process was killed"):
        trainer.run()
