"""All networks of the registry: exact sizes, shapes, isolation, reach along the depth."""

from __future__ import annotations

import pytest
import torch

from distilldsm.errors import ConfigError
from distilldsm.models.registry import MODEL_NAMES, build_model


@pytest.mark.parametrize(
    ("name", "in_channels", "out_channels", "options", "parameters"),
    [
        ("unet2d", 4, 3, {}, 1_082_211),
        ("residual_dsm", 4, 3, {}, 1_082_211),
        ("distill_dsm", 1, 2, {"alpha": 0.5}, 1_216_266),
        ("distill_dsm", 4, 3, {"alpha": 0.5}, 1_216_715),
        ("distill_dsm", 2, 2, {"alpha": 0.25}, 1_115_606),
        ("distill_dsm", 2, 2, {"alpha": 1.0}, 1_619_330),
        ("unet3d", 4, 3, {}, 4_288_208),
    ],
)
def test_parameter_counts_of_the_paper(name, in_channels, out_channels, options, parameters):
    network = build_model(name, in_channels=in_channels, out_channels=out_channels, **options)
    assert network.cost().parameters == parameters


@pytest.mark.parametrize(
    ("name", "options", "macs"),
    [
        ("unet2d", {}, 38_640),
        ("distill_dsm", {"alpha": 0.25}, 39_684),
        ("distill_dsm", {"alpha": 0.5}, 42_816),
        ("distill_dsm", {"alpha": 1.0}, 55_344),
        ("unet3d", {}, 29_891),
    ],
)
def test_macs_per_voxel(name, options, macs):
    cost = build_model(name, in_channels=4, out_channels=3, **options).cost()
    assert cost.macs_per_voxel == pytest.approx(macs, abs=0.5)
    assert f"{macs:,}" in str(cost)


def test_cost_leaves_the_network_as_it_was():
    network = build_model("distill_dsm", in_channels=1, out_channels=2).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.cost()
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.fixture(params=MODEL_NAMES)
def network(request):
    torch.manual_seed(0)
    return build_model(request.param, in_channels=2, out_channels=3).eval()


def test_shapes_for_any_depth(network):
    for depth in (1, 2, 5) if network.stride[0] == 1 else (16, 32):
        x = torch.randn(2, 2, depth, 32, 16)
        with torch.no_grad():
            assert network(x).shape == (2, 3, depth, 32, 16)


def test_a_volume_gives_the_same_alone_and_in_a_batch(network):
    depth = max(network.stride[0], 4)
    x = torch.randn(3, 2, depth, 16, 16)
    with torch.no_grad():
        together = network(x)
        for k in range(3):
            torch.testing.assert_close(together[k : k + 1], network(x[k : k + 1]), atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter(network):
    network.train()
    x = torch.randn(2, 2, max(network.stride[0], 3), 32, 32)
    network(x).square().mean().backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias before BatchNorm has a gradient of exactly zero in theory and of rounding size in practice.
    assert not [n for n in without if not n.endswith("bias")]


@pytest.mark.parametrize("name", ["unet2d", "residual_dsm", "distill_dsm"])
def test_depth_halo_is_the_exact_reach(name):
    """Changing a slice changes logits exactly `depth_halo` slices away and no further."""
    torch.manual_seed(1)
    network = build_model(name, in_channels=1, out_channels=2).eval()
    x = torch.randn(1, 1, 21, 16, 16)
    changed = x.clone()
    changed[:, :, 10] += 10 * torch.randn(16, 16)
    with torch.no_grad():
        difference = (network.double()(changed.double()) - network(x.double())).abs().amax(dim=(0, 1, 3, 4))
    reached = torch.nonzero(difference > 0).flatten()
    assert reached.min() == 10 - network.depth_halo
    assert reached.max() == 10 + network.depth_halo


@pytest.mark.parametrize("shape", [(1, 2, 4, 16), (1, 3, 4, 16, 16), (1, 2, 4, 16, 17)])
def test_wrong_input_is_refused(network, shape):
    with pytest.raises(ValueError, match=r"expected|multiples"):
        network(torch.zeros(shape))


def test_unknown_names_and_options():
    with pytest.raises(ConfigError, match="distill_dsm"):
        build_model("distil_dsm", in_channels=1, out_channels=2)
    with pytest.raises(ConfigError, match="alpha"):
        build_model("unet2d", in_channels=1, out_channels=2, alpha=0.5)
    with pytest.raises(ConfigError, match="in_channels"):
        build_model("unet2d", in_channels=0, out_channels=2)


def test_width_scales_the_network():
    small = build_model("distill_dsm", in_channels=1, out_channels=2, width=0.5).cost()
    assert small.parameters < 1_216_266 / 3
