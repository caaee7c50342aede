"""Losses, schedule, averaging, checkpoints, sampling, augmentation: each against something obvious."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss

from distilldsm.config import PreprocessConfig, TrainConfig
from distilldsm.core.errors import DataError
from distilldsm.data.preprocess import preprocess_dataset
from distilldsm.data.targets import Targets
from distilldsm.models import build_model
from distilldsm.models.checkpoint import load_tensors, load_weights, pack_optimizer, save_tensors, unpack_optimizer
from distilldsm.training.ema import WeightAverage
from distilldsm.training.losses import segmentation_loss, soft_dice_loss
from distilldsm.training.patches import PatchSampler, _cut, open_array
from distilldsm.training.schedule import FEW_STEPS, Plateau, learning_rate_at, remark_on_few_steps
from distilldsm.training.setup import choose_bf16, hash_seed, make_optimizer
from distilldsm.training.validation import structure_dice
from tests.data.volumes import write_dataset


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


def test_loss_is_float32_for_bf16_logits():
    logits = torch.randn(1, 3, 4, 4, 4, dtype=torch.bfloat16)
    loss = segmentation_loss(logits, torch.zeros(1, 4, 4, 4, dtype=torch.long), dice_weight=1, cross_entropy_weight=1)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "poly", "constant", "plateau"])
@pytest.mark.parametrize("total", [1, 2, 10, 1000])
def test_schedules_stay_within_the_peak(schedule, total):
    rates = [
        learning_rate_at(k, total_steps=total, peak=0.1, schedule=schedule, warmup_fraction=0.2) for k in range(total)
    ]
    assert all(0 < r <= 0.1 + 1e-12 for r in rates)
    if total == 1000:
        assert max(rates) == pytest.approx(0.1, rel=1e-3)
        if schedule in ("one_cycle", "cosine"):
            assert np.argmax(rates) == pytest.approx(200, abs=2)
            assert rates[0] < 0.01
            assert rates[-1] < 2e-4


def test_one_cycle_agrees_with_torch_on_the_way_down():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=799, eta_min=1e-4)
    for k in range(200, 1000):
        ours = learning_rate_at(k, total_steps=1000, peak=0.1, schedule="one_cycle", warmup_fraction=0.2)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step()


@given(st.integers(1, 600), st.integers(1, 60), st.integers(1, 20), st.integers(1, 8))
def test_what_is_said_of_few_steps_reaches_them(epochs, cases, samples, batch):
    def steps(samples_per_case: int) -> int:
        return max(1, cases * samples_per_case // batch)

    remark = remark_on_few_steps(epochs=epochs, steps_per_epoch=steps(samples), cases=cases, batch_size=batch)
    assert (remark is None) == (epochs * steps(samples) >= FEW_STEPS)
    if remark:
        longer, denser = (int(n) for n in re.findall(r"train\.\w+=(\d+)", remark))
        assert longer * steps(samples) >= FEW_STEPS > (longer - 1) * steps(samples)
        assert epochs * steps(denser) >= FEW_STEPS > epochs * (cases * (denser - 1) // batch)


def test_plateau_halves_after_patience_and_survives_a_restart():
    plateau = Plateau()
    for _ in range(12):
        plateau.update(1.0)
    assert plateau.factor == 0.5
    again = Plateau()
    again.load(plateau.state())
    again.update(0.1)
    assert (again.factor, again.best, again.waited) == (0.5, 0.1, 0)


def test_weight_average_follows_the_formula():
    network = build_model("unet2d", in_channels=1, out_channels=2, width=0.25)
    average = WeightAverage(network, 0.9)
    expected = {k: v.clone() for k, v in network.state_dict().items()}
    for step in range(1, 4):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        average.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
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
    optimizer = make_optimizer(TrainConfig(), network)
    network(torch.randn(1, 1, 2, 16, 16)).sum().backward()
    optimizer.step()
    tensors, meta = pack_optimizer(optimizer)
    save_tensors(tmp_path / "x.safetensors", {**tensors, **network.state_dict()}, {"optimizer": meta, "epoch": 3})
    loaded, loaded_meta = load_tensors(tmp_path / "x.safetensors")
    fresh = make_optimizer(TrainConfig(), network)
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
    decayed, others = make_optimizer(TrainConfig(weight_decay=0.1), network).param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert all(p.ndim == 4 for p in decayed["params"])
    assert sum(len(g["params"]) for g in (decayed, others)) == len(list(network.parameters()))


def test_seeds_differ_by_every_part():
    assert len({hash_seed(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)}) == 81


def test_bf16_choice():
    assert choose_bf16("bf16", torch.device("cpu"))
    assert not choose_bf16("fp32", torch.device("cpu"))
    assert isinstance(choose_bf16("auto", torch.device("cpu")), bool)


def test_structure_dice_on_empty_classes():
    truth = np.array([[0, 1], [1, 0]])
    three = Targets(("background", "a", "b"), (0, 1, 2))
    two = Targets(("background", "a"), (0, 1))
    assert structure_dice(truth, truth, three) == [1.0, 1.0]
    assert structure_dice(np.zeros_like(truth), truth, two) == [0.0]
    assert structure_dice(np.array([[0, 1], [0, 0]]), truth, two) == [pytest.approx(2 / 3)]


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    output = tmp_path_factory.mktemp("preprocessed")
    index = write_dataset(root, cases=7)
    preprocess_dataset(root, index, PreprocessConfig(folds=3, workers=1), output)
    return output, [c.id for c in index.cases]


def sampler(preprocessed, **changes) -> PatchSampler:
    options = {
        "patch_size": (8, 16, 16),
        "stride": (1, 16, 16),
        "foreground_oversampling": 0.5,
        "samples_per_case": 1,
        "batch_size": 2,
        "seed": 0,
    }
    return PatchSampler(preprocessed[0], preprocessed[1], **{**options, **changes})


def test_batches_depend_on_epoch_and_step_only(preprocessed):
    one, two = sampler(preprocessed), sampler(preprocessed)
    two.batch(5, 0)
    for a, b in zip(one.batch(3, 1), two.batch(3, 1), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(one.batch(3, 1)[0], one.batch(4, 1)[0])


def test_an_epoch_uses_every_case_once(preprocessed):
    s = sampler(preprocessed, batch_size=1)
    assert s.steps_per_epoch == 7
    assert sorted(s.epoch_order(0)) == list(range(7))
    assert list(s.epoch_order(0)) != list(s.epoch_order(1))
    assert sampler(preprocessed, batch_size=20).steps_per_epoch == 1
    assert len(sampler(preprocessed, batch_size=20).epoch_order(0)) == 20


def test_processes_share_a_batch(preprocessed):
    s = sampler(preprocessed, batch_size=4)
    whole = s.batch(0, 0)[0]
    parts = [s.batch(0, 0, rank=r, world=2)[0] for r in range(2)]
    assert np.array_equal(whole[0::2], parts[0])
    assert np.array_equal(whole[1::2], parts[1])


def test_depth_is_never_made_up(preprocessed):
    """A batch is as deep as its shallowest case, so that no slice of zeros is learnt from."""
    s = sampler(preprocessed, patch_size=(99, 16, 16), batch_size=7)
    _, _, size = s.batch(0, 0)
    assert size[0] == s.depths.min()


def test_foreground_oversampling_hits_foreground(preprocessed):
    always = sampler(preprocessed, patch_size=(2, 16, 16), foreground_oversampling=1.0, batch_size=7, margin=1.0)
    _, labels, size = always.batch(0, 0)
    assert labels.shape[1:] == size
    assert all((label > 0).any() for label in labels)


@settings(deadline=None, max_examples=40)
@given(shape=st.tuples(*[st.integers(1, 6)] * 3), size=st.tuples(*[st.integers(1, 7)] * 3), data=st.data())
def test_cutting_equals_indexing_a_padded_volume(shape, size, data):
    array = np.random.default_rng(0).integers(1, 100, (2, *shape))
    centre = [data.draw(st.integers(0, n)) for n in shape]
    padded = np.pad(array, [(0, 0)] + [(10, 10)] * 3)
    window = tuple(slice(10 + c - s // 2, 10 + c - s // 2 + s) for c, s in zip(centre, size, strict=True))
    assert np.array_equal(_cut(array, centre, size), padded[(slice(None), *window)])


def test_missing_array_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.npy"):
        open_array(tmp_path / "gone.npy")


def test_plateau_schedule_starts_at_the_peak():
    assert math.isclose(learning_rate_at(0, total_steps=5, peak=1, schedule="plateau", warmup_fraction=0), 1)
