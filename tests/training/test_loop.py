"""The loop: what is kept, when it stops, which rate a step has, what a record says."""

from __future__ import annotations

import math

import pytest
import torch

from distilldsm.config import AugmentConfig, ModelConfig
from distilldsm.models.checkpoint import load_tensors
from distilldsm.training import loop
from distilldsm.training.distributed import Processes
from distilldsm.training.loop import BEST, LAST, RESUME, Trainer
from distilldsm.training.schedule import learning_rate_at
from distilldsm.training.setup import hash_seed
from tests.training.test_train_stage import config

STILL = AugmentConfig(spatial_probability=0, intensity_probability=0)


@pytest.fixture
def trainer(preprocessed, tmp_path):
    def make(**changes) -> Trainer:
        return Trainer(config(augment=STILL, **changes), preprocessed=preprocessed, work=tmp_path, fold=0)

    return make


def scored(monkeypatch, *scores: float) -> None:
    each = iter(scores)
    monkeypatch.setattr(loop, "validate", lambda *_, **__: {"shell": next(each, 0.5), "core": 0.5})


def weights_by_epoch(made: Trainer) -> list[dict[str, torch.Tensor]]:
    """Filled while it runs: the averaged weights after each epoch."""
    kept: list[dict[str, torch.Tensor]] = []
    made.on_epoch = lambda _: kept.append({k: v.clone() for k, v in made.average.network.state_dict().items()})
    return kept


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_best_and_last_weights_are_kept_and_it_stops_early(trainer, monkeypatch, tmp_path):
    scored(monkeypatch, 0.5, 0.7, 0.7, 0.6, 0.9)
    made = trainer(epochs=9, validate_every=1, early_stopping=2)
    kept = weights_by_epoch(made)
    state = made.run()
    assert (state.epoch, state.step, state.best_dice, state.validations_without_gain) == (4, 8, 0.6, 2)
    assert len(kept) == 4
    for name, epoch in ((BEST, 2), (LAST, 4)):
        tensors, meta = load_tensors(tmp_path / name)
        assert same(tensors, kept[epoch - 1])
        assert meta == {"epoch": epoch, "model": {"name": "distill_dsm", "options": {"width": 0.25}}}
    assert [record["val_dice_mean"] for record in state.history] == [0.5, 0.6, 0.6, 0.55]
    assert state.history[1]["val_dice"] == {"shell": 0.7, "core": 0.5}


def test_without_a_better_score_the_last_weights_are_the_best(trainer, monkeypatch, tmp_path):
    scored(monkeypatch, 0.5)
    made = trainer(epochs=1, validate_every=1)
    made.state.best_dice = 0.9  # of an earlier start, whose file is lost
    kept = weights_by_epoch(made)
    made.run()
    assert same(load_tensors(tmp_path / BEST)[0], kept[0])


def test_it_is_validated_every_so_often_and_at_the_end(trainer, monkeypatch):
    scored(monkeypatch, 0.1, 0.2, 0.3)
    state = trainer(epochs=5, validate_every=2).run()
    assert [record["epoch"] for record in state.history if "val_dice" in record] == [2, 4, 5]
    assert state.best_dice == 0.4


@pytest.mark.parametrize("schedule", ["one_cycle", "poly", "plateau", "constant"])
def test_each_step_has_its_rate(trainer, monkeypatch, schedule):
    """Two steps an epoch; a plateau's factor counts for its own schedule only."""
    made = trainer(epochs=3, schedule=schedule)
    scored(monkeypatch, 0.1, 0.2, 0.3)
    made.plateau.factor = 0.5
    losses, used, averaged = iter(range(1, 7)), [], []

    def step(*_) -> float:
        used.append({group["lr"] for group in made.optimizer.param_groups})
        return float(next(losses))

    monkeypatch.setattr(made, "step", step)
    monkeypatch.setattr(made.average, "update", lambda one, number: averaged.append((one is made.network, number)))
    state = made.run()
    expected = [
        learning_rate_at(k, total_steps=6, peak=0.01, schedule=schedule, warmup_fraction=made.config.warmup_fraction)
        * (0.5 if schedule == "plateau" else 1)
        for k in range(6)
    ]
    assert [list(rates) for rates in used] == [[pytest.approx(rate)] for rate in expected]
    assert [record["learning_rate"] for record in state.history] == pytest.approx(expected[1::2], rel=1e-3)
    assert [record["train_loss"] for record in state.history] == [1.5, 3.5, 5.5]
    assert averaged == [(True, k) for k in range(1, 7)]
    assert (made.plateau.best, made.plateau.waited) == (1.5, 2)


@pytest.mark.parametrize("norm", [0.05, 0.0])
def test_gradients_are_clipped(trainer, norm):
    """The first step of SGD with Nesterov momentum m moves by rate x (1 + m) x gradient."""
    made = trainer(optimizer="sgd", momentum=0.5, weight_decay=0.0, gradient_clip_norm=norm, precision="fp32")
    before = [p.detach().clone() for p in made.trained.parameters()]
    assert made.step(*made.sampler.batch(0, 0), 0, 0) > 0
    pairs = zip(made.trained.parameters(), before, strict=True)
    moved = math.sqrt(sum(float((p.detach() - q).square().sum()) for p, q in pairs))
    assert all(p.grad is None for p in made.trained.parameters())
    assert (moved == pytest.approx(0.01 * 1.5 * norm, rel=2e-2)) if norm else moved > 1e-3


def test_a_checkpoint_after_so_many_minutes(trainer, monkeypatch):
    """The clock goes on by 50 s an epoch: with one minute every second epoch is kept, and the end."""
    kept: list[int] = []
    made = trainer(epochs=5, checkpoint_minutes=1.0, validate_every=9)
    scored(monkeypatch, 0.1)
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])

    def epoch(number: int) -> dict:
        now[0] += 50
        return {"epoch": number + 1, "train_loss": 0.5, "learning_rate": 0.1, "seconds": 50.0}

    monkeypatch.setattr(made, "_train_epoch", epoch)
    monkeypatch.setattr(made, "_save_resume", lambda: kept.append(made.state.epoch))
    made.run()
    assert kept == [2, 4, 5]


def test_the_line_of_an_epoch(trainer, capsys, monkeypatch):
    monkeypatch.setattr(loop, "memory_text", lambda: "1.5 GB")
    made = trainer(epochs=4)
    capsys.readouterr()
    record = {"epoch": 2, "train_loss": 0.51234, "learning_rate": 0.00123, "seconds": 3.21}
    made._print(record, seconds_left=0)
    made._print(record | {"val_dice": {"a": 0.5, "b": 0.25}, "val_dice_mean": 0.375}, seconds_left=30.0)
    begin = "epoch 2/4  loss 0.5123  lr 1.23e-03  3.2 s"
    assert capsys.readouterr().err.splitlines() == [
        begin,
        begin + "  Dice a 0.5000  b 0.2500  val_dice_mean=0.375000  about 30 s left, 1.5 GB",
    ]


def test_what_is_kept_of_an_interrupted_training(trainer):
    made = trainer(epochs=4)
    made.state.epoch = 1
    assert made._kept() == (
        "train: 0 of 4 epochs are kept; 1 since the last checkpoint are trained again (train.checkpoint_minutes)"
    )
    made._save_resume()
    assert made._kept() == "train: 1 of 4 epochs are kept"
    assert (made.work / RESUME).exists()


def test_a_damaged_checkpoint_means_a_new_start(trainer, capsys):
    made = trainer(epochs=4)
    made.state.epoch = 3
    made._save_resume()
    assert trainer(epochs=4).state.epoch == 3
    content = bytearray((made.work / RESUME).read_bytes())
    content[-3] ^= 1
    (made.work / RESUME).write_bytes(content)
    assert trainer(epochs=4).state.epoch == 0
    assert "its numbers have changed since they were written; training starts again" in capsys.readouterr().err


def test_margins_are_read_for_what_turns_or_bends(trainer, tmp_path, preprocessed):
    assert trainer().sampler.margin == 1.0
    for name in ("spatial", "elastic"):
        settings = config(augment=AugmentConfig(**{"spatial_probability": 0, f"{name}_probability": 0.1}))
        assert Trainer(settings, preprocessed=preprocessed, work=tmp_path, fold=0).sampler.margin == 1.2


@pytest.mark.parametrize("levels", [0, 2])
def test_lower_levels_are_trained_too_if_asked_for(trainer, levels, capsys):
    made = trainer(deep_supervision=levels)
    assert len(getattr(made.trained, "heads", ())) == levels
    assert (made.trained is made.network) == (levels == 0)
    assert "deep_supervision" not in capsys.readouterr().err


def test_each_step_and_process_draws_its_own(trainer):
    made = trainer()
    seeds = [made.config.seed, 3, 4, 0]
    assert (
        made._draws(3, 4).rand(2).tolist()
        == torch.rand(2, generator=torch.Generator().manual_seed(hash_seed(*seeds))).tolist()
    )
    firsts = {float(made._draws(epoch, step).rand(1)) for epoch in range(3) for step in range(3)}
    assert len(firsts) == 9
    made.processes = Processes(rank=1, world=2)
    shared, own = made._draws(3, 4), torch.Generator().manual_seed(hash_seed(made.config.seed, 3, 4, 1, 2))
    assert (shared.rank, shared.world) == (1, 2)
    assert torch.equal(shared.noise((3,)), torch.randn(3, generator=own))


def test_halves_of_a_batch_have_the_loss_of_the_whole(trainer):
    found = []
    for accumulate in (1, 2):
        made = trainer(
            model=ModelConfig(name="unet3d", options={"base_width": 2}), accumulate=accumulate, dice_weight=0.0,
            precision="fp32",
        )  # fmt: skip
        found.append(made.step(*made.sampler.batch(0, 0), 0, 0))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
