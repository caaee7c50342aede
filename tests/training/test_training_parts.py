"""Losses, schedule, averaging, checkpoints, sampling, augmentation: each against something obvious."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from distilldsm.config import ModelConfig, TrainConfig
from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.data.targets import Targets
from distilldsm.models import build_model
from distilldsm.models.checkpoint import load_tensors, load_weights, pack_optimizer, save_tensors, unpack_optimizer
from distilldsm.training.ema import WeightAverage
from distilldsm.training.losses import class_shares, region_targets, segmentation_loss, soft_dice_loss
from distilldsm.training.setup import (
    build_network,
    choose_bf16,
    choose_device,
    hash_seed,
    make_optimizer,
    require_compiler,
    seed_everything,
)
from distilldsm.training.validation import spread, structure_dice
from tests.data.test_geometry import make_plan


def test_dice_loss_agrees_with_monai():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, 7)
    labels = torch.randint(0, 4, (3, 5, 6, 7))
    theirs = DiceLoss(
        include_background=False, softmax=True, to_onehot_y=True, batch=True, smooth_nr=1.0, smooth_dr=1.0
    )
    assert float(soft_dice_loss(logits, labels)) == pytest.approx(float(theirs(logits, labels[:, None])), abs=1e-6)


def test_loss_weights_and_perfect_prediction():
    labels = torch.randint(0, 3, (2, 4, 4, 4))
    perfect = 50 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    assert float(segmentation_loss(perfect, labels, dice_weight=1, cross_entropy_weight=1)) < 1e-4
    logits = torch.randn(2, 3, 4, 4, 4)
    both = segmentation_loss(logits, labels, dice_weight=0.5, cross_entropy_weight=2)
    dice = segmentation_loss(logits, labels, dice_weight=1, cross_entropy_weight=0)
    entropy = segmentation_loss(logits, labels, dice_weight=0, cross_entropy_weight=1)
    assert float(both) == pytest.approx(0.5 * float(dice) + 2 * float(entropy), rel=1e-5)


@pytest.mark.parametrize("regions", [None, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])])
def test_shares_of_zero_and_one_have_the_loss_of_the_classes(regions):
    logits, labels = torch.randn(2, 3 if regions is None else 2, 4, 5, 6), torch.randint(0, 3, (2, 4, 5, 6))
    shares = torch.stack([labels == k for k in (1, 2)], dim=1).float()
    of_classes, of_shares = (
        segmentation_loss(logits, target, dice_weight=1, cross_entropy_weight=1, regions=regions)
        for target in (labels, shares)
    )
    torch.testing.assert_close(of_shares, of_classes)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("regions", [None, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])])
def test_both_losses_are_lowest_where_probabilities_equal_the_shares(regions, weights):
    shares = torch.distributions.Dirichlet(torch.ones(3)).sample((1, 4, 4, 4)).movedim(-1, 1)[:, 1:]
    truth = class_shares(shares, 3) if regions is None else region_targets(shares, regions)
    exact = truth.log() if regions is None else truth.logit()

    def loss(logits: torch.Tensor) -> float:
        dice, entropy = weights
        return float(segmentation_loss(logits, shares, dice_weight=dice, cross_entropy_weight=entropy, regions=regions))

    for _ in range(5):
        assert loss(exact) < loss(exact + 0.3 * torch.randn_like(exact))
    assert loss(exact) < loss(3 * exact)  # more certain


def test_dice_over_processes_is_of_their_sums():
    logits, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 4, 4, 4))
    twice = soft_dice_loss(torch.cat((logits, logits)), torch.cat((labels, labels)))
    assert float(soft_dice_loss(logits, labels, over_processes=lambda v: 2 * v)) == pytest.approx(float(twice))


def test_loss_is_float32_for_bf16_logits():
    logits = torch.randn(1, 3, 4, 4, 4, dtype=torch.bfloat16)
    loss = segmentation_loss(logits, torch.zeros(1, 4, 4, 4, dtype=torch.long), dice_weight=1, cross_entropy_weight=1)
    assert loss.dtype == torch.float32
    exact = segmentation_loss(
        logits.double(), torch.zeros(1, 4, 4, 4, dtype=torch.long), dice_weight=1, cross_entropy_weight=1
    )
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("highest", [0.9, 0.2, 0.0])
def test_weight_average_follows_the_formula(highest):
    network = build_model("unet2d", in_channels=1, out_channels=2, width=0.25)
    average = WeightAverage(network, highest)
    assert not average.network.training
    assert not any(p.requires_grad for p in average.network.parameters())
    expected = {k: v.clone() for k, v in network.state_dict().items()}
    for step in range(1, 4):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        average.update(network, step)
        decay = min(highest, (1 + step) / (10 + step))
        for k, v in network.state_dict().items():
            expected[k] = v.clone() if not v.is_floating_point() else decay * expected[k] + (1 - decay) * v
    for k, v in average.network.state_dict().items():
        torch.testing.assert_close(v, expected[k])


def test_the_order_of_parameters_changes_no_byte(tmp_path: Path):
    for name, options in (("a", {"width": 1, "alpha": 2}), ("b", {"alpha": 2, "width": 1})):
        save_tensors(tmp_path / name, {"w": torch.zeros(2)}, {"options": options})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_checkpoints_keep_everything_and_hold_no_pickle(tmp_path: Path):
    network = build_model("distill_dsm", in_channels=1, out_channels=2, width=0.25)
    optimizer = make_optimizer(TrainConfig(), network, 0.1)
    network(torch.randn(1, 1, 2, 16, 16)).sum().backward()
    optimizer.step()
    tensors, meta = pack_optimizer(optimizer)
    save_tensors(tmp_path / "x.safetensors", {**tensors, **network.state_dict()}, {"optimizer": meta, "epoch": 3})
    loaded, loaded_meta = load_tensors(tmp_path / "x.safetensors")
    fresh = make_optimizer(TrainConfig(), network, 0.1)
    unpack_optimizer(fresh, {k: v for k, v in loaded.items() if k.startswith("optimizer.")}, loaded_meta["optimizer"])
    before, after = optimizer.state_dict(), fresh.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, entries in before["state"].items():
        for name, value in entries.items():
            assert torch.equal(value, after["state"][index][name])
    assert b"torch._utils" not in (tmp_path / "x.safetensors").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_damaged_or_foreign_checkpoints_are_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(DataError, match="not found"):
        load_tensors(path)
    path.write_bytes(b"\x80\x04not safetensors")
    with pytest.raises(DataError, match="not a readable checkpoint"):
        load_tensors(path)
    network = build_model("unet2d", in_channels=1, out_channels=2, width=0.25)
    other = build_model("unet2d", in_channels=2, out_channels=2, width=0.25)
    with pytest.raises(DataError, match="does not fit"):
        load_weights(network, other.state_dict(), path)


def test_weight_decay_spares_biases_and_norms():
    network = build_model("unet2d", in_channels=1, out_channels=2)
    decayed, others = make_optimizer(TrainConfig(weight_decay=0.1), network, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert all(p.ndim == 4 for p in decayed["params"])
    assert sum(len(g["params"]) for g in (decayed, others)) == len(list(network.parameters()))


def test_seeds_differ_by_every_part():
    assert hash_seed(1, 2, 3) == 6498626229777268288
    assert len({hash_seed(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)}) == 81


@pytest.mark.parametrize("has", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", "none"])
def test_bf16_choice(monkeypatch, has):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has, raising=False)
    assert choose_bf16("bf16", torch.device("cpu"))
    assert not choose_bf16("fp32", torch.device("cpu"))
    assert choose_bf16("auto", torch.device("cpu")) == (has != "none")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has == "none")
    assert choose_bf16("auto", torch.device("cuda")) == (has == "none")


def test_the_device_that_is_asked_for(monkeypatch):
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert choose_device("cpu", 1) == torch.device("cpu")
        assert choose_device("auto", 1) == (torch.device("cuda", 1) if gpu else torch.device("cpu"))
    with pytest.raises(ConfigError, match="no GPU is available"):
        choose_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("cuda", 2) == torch.device("cuda", 2)


@pytest.mark.parametrize(
    ("name", "kind", "defaults"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("adam", torch.optim.Adam, {"decoupled_weight_decay": False}),
        ("adamw", torch.optim.AdamW, {}),
    ],
)
def test_the_optimizer_is_the_configured_one(name, kind, defaults):
    network = build_model("unet2d", in_channels=1, out_channels=2, width=0.25)
    made = make_optimizer(TrainConfig(optimizer=name, momentum=0.8), network, 0.25)
    assert type(made) is kind
    assert {"lr": 0.25, **defaults}.items() <= made.defaults.items()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("name", "option"), [("unet2d", {"width": 0.25}), ("unet3d", {"base_width": 2})])
def test_the_network_of_a_plan(channels_last, name, option):
    plan = make_plan(class_names=("background", "a", "b"), class_values=(0, 1, 2))
    settings = TrainConfig(model=ModelConfig(name=name, options=option), channels_last=channels_last)
    network = build_network(settings, plan, torch.device("cpu"))
    assert (network.in_channels, network.out_channels) == (1, 3)
    weights = [p for p in network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1]
    last = [p.is_contiguous(memory_format=torch.channels_last) for p in weights]
    assert all(last) == (channels_last or name == "unet3d")
    assert any(last) == (channels_last and name == "unet2d")


def test_structure_dice_on_empty_classes():
    truth = np.array([[0, 1], [1, 0]])
    three = Targets(("background", "a", "b"), (0, 1, 2))
    two = Targets(("background", "a"), (0, 1))
    assert structure_dice(truth, truth, three) == [1.0, 1.0]
    assert structure_dice(np.zeros_like(truth), truth, two) == [0.0]
    assert structure_dice(np.array([[0, 1], [0, 0]]), truth, two) == [pytest.approx(2 / 3)]


def test_the_same_seed_draws_the_same():
    drawn = []
    for seed in (1, 1, 2):
        seed_everything(seed, deterministic=False)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_compile_without_a_compiler(tmp_path, monkeypatch, device, variable):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(
        UserError, match=rf"train\.compile: needs a C\+\+ compiler\n  seen: no (.|\n)*hint: .*{variable}"
    ):
        require_compiler(device)
    monkeypatch.setenv(variable, "mine")
    (tmp_path / "mine").touch(0o755)
    require_compiler(device)


@pytest.mark.parametrize(("count", "chosen"), [(9, "abcde"), (5, "abcde"), (2, "ac"), (1, "a")])
def test_training_cases_to_score_are_spread(count, chosen):
    assert spread("abcde", count) == list(chosen)
