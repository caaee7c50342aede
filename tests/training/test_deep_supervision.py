"""Losses on lower decoder levels: right heads, right weights, nothing of it in the model."""

from __future__ import annotations

import pytest
import torch

from distilldsm.models import build_model
from distilldsm.training.deep_supervision import DeeplySupervised, supervised_loss
from distilldsm.training.losses import segmentation_loss


@pytest.mark.parametrize(("name", "options"), [("distill_dsm", {"width": 0.25}), ("unet3d", {"base_width": 4})])
def test_heads_sit_on_the_levels_below(name, options):
    torch.manual_seed(0)
    network = build_model(name, in_channels=1, out_channels=3, **options)
    supervised = DeeplySupervised(network, 2)
    x = torch.randn(2, 1, 16, 32, 48)
    full, half, quarter = supervised(x)
    torch.testing.assert_close(full, network(x))
    depths = (16, 16) if name == "distill_dsm" else (8, 4)
    assert half.shape == (2, 3, depths[0], 16, 24)
    assert quarter.shape == (2, 3, depths[1], 8, 12)
    loss = sum(out.square().mean() for out in (half, quarter))
    loss.backward()
    assert all(p.grad is not None for head in supervised.heads for p in head.parameters())
    assert network.head.weight.grad is None  # the last level learns from its own loss only
    assert set(network.state_dict()) == set(build_model(name, in_channels=1, out_channels=3, **options).state_dict())


def test_weights_halve_and_sum_to_one():
    labels = torch.zeros(1, 4, 8, 8, dtype=torch.long)
    outputs = [torch.full((1, 2, 4, 8 // s, 8 // s), float(v)) for s, v in ((1, 1), (2, 10), (4, 100))]
    found = supervised_loss(outputs, labels, lambda logits, truth: logits.mean() + 0 * truth.sum())
    assert float(found) == pytest.approx((1 + 10 / 2 + 100 / 4) / (1 + 1 / 2 + 1 / 4))
    assert float(supervised_loss(outputs[0], labels, lambda logits, truth: logits.mean())) == 1.0


def test_lower_levels_see_the_truth_of_their_place():
    labels = torch.zeros(1, 2, 8, 8, dtype=torch.long)
    labels[:, :, 4:, :4] = 1
    low = torch.nn.functional.one_hot(labels[:, :, ::2, ::2], 2).movedim(-1, 1).float() * 40 - 20

    def loss(logits, truth):
        return segmentation_loss(logits, truth, dice_weight=0.0, cross_entropy_weight=1.0)

    assert float(supervised_loss([low], labels, loss)) < 1e-6
