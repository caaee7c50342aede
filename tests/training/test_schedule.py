"""The learning rate, step by step."""

from __future__ import annotations

import math

import pytest
import torch

from distilldsm.training.schedule import Plateau, learning_rate_at


def rates(schedule: str, total: int, warmup_fraction: float = 0.2) -> list[float]:
    options = {"total_steps": total, "peak": 0.1, "schedule": schedule, "warmup_fraction": warmup_fraction}
    return [learning_rate_at(k, **options) for k in range(total)]


DOWN = [0.1 * (0.001 + 0.999 * (1 + math.cos(math.pi * k / 7)) / 2) for k in range(8)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            "one_cycle",
            [0.052, 0.1, 0.1, *(0.1 * (0.001 + 0.999 * (1 + math.cos(math.pi * k / 7)) / 2) for k in range(1, 8))],
        ),
        (
            "cosine",
            [0.05, 0.1, 0.1, *(0.1 * (0.001 + 0.999 * (1 + math.cos(math.pi * k / 7)) / 2) for k in range(1, 8))],
        ),
        ("poly", [0.1 * (1 - k / 10) ** 0.9 for k in range(10)]),
        ("constant", [0.1] * 10),
        ("plateau", [0.1] * 10),
    ],
)
def test_ten_steps_of_each(schedule, expected):
    assert rates(schedule, 10) == pytest.approx(expected)
    for total in (1, 2):
        assert all(0 < rate <= 0.1 + 1e-12 for rate in rates(schedule, total))
    if schedule == "one_cycle":
        low = rates(schedule, 20)[0]
        assert low == pytest.approx(0.004 + 0.096 * (1 - math.cos(math.pi / 4)) / 2)
        beyond = learning_rate_at(50, total_steps=10, peak=1, schedule=schedule, warmup_fraction=0)
        assert beyond == pytest.approx(1e-3)
    if schedule == "poly":
        assert learning_rate_at(11, total_steps=10, peak=1, schedule=schedule, warmup_fraction=0) == 0
        assert learning_rate_at(1, total_steps=1, peak=1, schedule=schedule, warmup_fraction=0) == 0
        assert learning_rate_at(0, total_steps=0, peak=1, schedule=schedule, warmup_fraction=0) == 1


def test_one_cycle_agrees_with_torch_on_the_way_down():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=799, eta_min=1e-4)
    for k in range(200, 1000):
        ours = learning_rate_at(k, total_steps=1000, peak=0.1, schedule="one_cycle", warmup_fraction=0.2)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step()


def test_plateau_halves_after_patience_and_survives_a_restart():
    plateau = Plateau()
    assert plateau.state() == {"best": 1e30, "waited": 0, "factor": 1.0}
    plateau.update(1.0)
    for k in range(1, 11):
        plateau.update(0.9999)  # no gain: one part in ten thousand is the least
        assert (plateau.factor, plateau.best, plateau.waited) == (1.0, 1.0, k)
    plateau.update(1.0)
    assert (plateau.factor, plateau.waited) == (0.5, 0)
    for _ in range(11):
        plateau.update(2.0)
    assert plateau.state() == {"best": 1.0, "waited": 0, "factor": 0.25}
    plateau.update(2.0)
    again = Plateau()
    again.load(plateau.state())
    assert (again.factor, again.best, again.waited) == (0.25, 1.0, 1)
    again.update(0.9998)
    assert (again.factor, again.best, again.waited) == (0.25, 0.9998, 0)
