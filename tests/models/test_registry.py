"""All networks of the registry: exact sizes, shapes, isolation, reach along the depth."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from distilldsm.cli.main import main
from distilldsm.config.networks import MODEL_NAMES, MODELS, ModelEntry
from distilldsm.core.errors import ConfigError
from distilldsm.models import build_model
from distilldsm.models.base import SegmentationNetwork
from tests.models.small import NEEDED


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
    return build_model(request.param, in_channels=2, out_channels=3, **NEEDED.get(request.param, {})).eval()


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


@pytest.mark.parametrize(
    ("name", "options", "reach"),
    [
        ("unet2d", {}, 0),
        *((name, {}, 8) for name in ("residual_dsm", "distill_dsm")),
        *((name, {"shift_at": part}, 4) for name in ("residual_dsm", "distill_dsm") for part in ("encoder", "decoder")),
        ("distill_dsm", {"shift_at": (4,)}, 1),
        ("distill_dsm", {"shift_at": (0, 3)}, 3),
        ("distill_dsm", {"initialisation": "identity"}, 8),
        ("residual_dsm", {"initialisation": "identity", "shift_at": "decoder", "add": False}, 4),
    ],
)
def test_depth_halo_is_the_exact_reach(name, options, reach):
    """Changing a slice changes logits exactly `depth_halo` slices away and no further."""
    torch.manual_seed(1)
    network = build_model(name, in_channels=1, out_channels=2, **options).eval()
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if ".shift." in parameter_name and options.get("initialisation") == "identity":
                parameter.normal_(std=0.2)
    assert network.depth_halo == reach
    x = torch.randn(1, 1, 21, 16, 16)
    changed = x.clone()
    changed[:, :, 10] += 10 * torch.randn(16, 16)
    with torch.no_grad():
        difference = (network.double()(changed.double()) - network(x.double())).abs().amax(dim=(0, 1, 3, 4))
    reached = torch.nonzero(difference > 0).flatten()
    assert reached.min() == 10 - network.depth_halo
    assert reached.max() == 10 + network.depth_halo


@pytest.mark.parametrize("shape", [(1, 2, 4, 16), (1, 3, 4, 16, 16)])
def test_wrong_input_is_refused(network, shape):
    with pytest.raises(ValueError, match="expected"):
        network(torch.zeros(shape))


def test_sizes_between_the_strides_are_refused():
    with pytest.raises(ValueError, match="multiples"):
        build_model("unet3d", in_channels=2, out_channels=3)(torch.zeros(1, 2, 16, 16, 17))


def test_unknown_names_and_options():
    with pytest.raises(ConfigError, match="distill_dsm"):
        build_model("distil_dsm", in_channels=1, out_channels=2)
    with pytest.raises(ConfigError, match="alpha"):
        build_model("unet2d", in_channels=1, out_channels=2, alpha=0.5)
    with pytest.raises(ConfigError, match="in_channels"):
        build_model("unet2d", in_channels=0, out_channels=2)


@pytest.mark.parametrize("name", ["distill_dsm", "distill_dsm_m", "distill_dsm_l", "residual_dsm"])
def test_where_modules_are(name):
    for shift_at, places in (
        ("all", ["encoder.1", "encoder.2", "encoder.3", "encoder.4", *(f"decoder.{k}" for k in range(4))]),
        ("encoder", ["encoder.1", "encoder.2", "encoder.3", "encoder.4"]),
        ("decoder", ["decoder.0", "decoder.1", "decoder.2", "decoder.3"]),
        ([3, 4], ["encoder.3", "encoder.4", "decoder.0"]),
        ((0,), ["decoder.3"]),
    ):
        network = build_model(name, in_channels=1, out_channels=2, shift_at=shift_at)
        blocks = {n: m for n, m in network.named_modules() if hasattr(m, "shift") and n.count(".") == 1}
        assert [n for n, block in blocks.items() if block.shift is not None] == places


@pytest.mark.parametrize(
    ("name", "options"), [("distill_dsm", {}), ("residual_dsm", {}), ("residual_dsm", {"add": False})]
)
def test_with_identity_it_is_at_first_the_2d_network(name, options):
    flat = build_model("unet2d", in_channels=2, out_channels=3).eval()
    network = build_model(name, in_channels=2, out_channels=3, initialisation="identity", **options).eval()
    assert network.flat_names().keys() == flat.state_dict().keys()
    network.load_state_dict(flat.state_dict(), strict=False)
    x = torch.randn(2, 2, 4, 32, 16)
    with torch.no_grad():
        assert torch.equal(network(x), flat(x))
    network.train()(x).square().mean().backward()
    modules = [p for n, p in network.named_parameters() if ".shift." in n]
    assert modules
    assert all(float(p.grad.abs().sum()) > 0 for p in modules if p.ndim != 1 or name == "residual_dsm")


def test_the_default_draws_its_weights_as_ever():
    """Block by block, the module first: recorded results depend on their seeds."""
    torch.manual_seed(3)
    weights = build_model("distill_dsm", in_channels=2, out_channels=3).state_dict()
    torch.manual_seed(3)
    blocks = [f"encoder.{k}" for k in range(5)] + [f"decoder.{k}" for k in range(4)]
    layers = [f"{b}.{layer}" for b in blocks for layer in ("shift.convolution", "first.0", "second.0")] + ["head"]
    for name in layers:
        if f"{name}.weight" in weights:
            expected = weights[f"{name}.weight"]
            drawn = torch.nn.Conv2d(expected.shape[1], expected.shape[0], tuple(expected.shape[2:]))
            assert torch.equal(drawn.weight, expected), name
            assert torch.equal(drawn.bias, weights[f"{name}.bias"]), name


@pytest.mark.parametrize(
    "options",
    [
        {"shift_at": "bottom"},
        {"shift_at": []},
        {"shift_at": [5]},
        {"shift_at": [True]},
        {"shift_at": {"encoder": 1}},
        {"initialisation": "zeros"},
        {"alpha": [0.5]},
        {"width": {"a": 1}},
    ],
    ids=str,
)
def test_impossible_options(options):
    with pytest.raises(ConfigError, match=rf"options.*{next(iter(options))}(.|\n)*rule"):
        build_model("distill_dsm", in_channels=1, out_channels=2, **options)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (1, 4, 5, 4)),
        (torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (1, 4, 5, 4)),
        (torch.nn.ConvTranspose2d(3, 2, 2, stride=2), (2, 3, 4, 3)),
        (torch.nn.ConvTranspose3d(2, 3, (1, 2, 2), stride=2, bias=False), (1, 2, 2, 3, 2)),
    ],
    ids=str,
)
def test_macs_are_those_of_a_slow_count(layer, shape):
    class One(SegmentationNetwork):
        def __init__(self):
            super().__init__(1, 1)
            self.layer = layer

        def forward(self, x, features=None):
            return self.layer(torch.ones(shape))

    # With ones everywhere, the sum of all outputs is the number of products that are not cut away with the padding.
    with torch.no_grad():
        layer.weight.fill_(1)
        if layer.bias is not None:
            layer.bias.zero_()
    kernel = [range(k) for k in layer.kernel_size]
    transposed = isinstance(layer, torch.nn.ConvTranspose2d | torch.nn.ConvTranspose3d)
    walked = shape[2:] if transposed else layer(torch.ones(shape)).shape[2:]
    other = layer(torch.ones(shape)).shape[2:] if transposed else shape[2:]
    count, inside = 0, 0
    for _ in range(shape[0]):
        for c, k in itertools.product(range(layer.in_channels), range(layer.out_channels)):
            if c * layer.groups // layer.in_channels != k * layer.groups // layer.out_channels:
                continue
            for place in itertools.product(*map(range, walked)):
                for offset in itertools.product(*kernel):
                    count += 1
                    reached = [
                        p * s + o - q for p, s, o, q in zip(place, layer.stride, offset, layer.padding, strict=True)
                    ]
                    inside += all(0 <= r < n for r, n in zip(reached, other, strict=True))
    assert float(layer(torch.ones(shape)).detach().sum()) == inside
    assert One().cost().macs_per_voxel == count / (2 * 32 * 32)


def test_width_scales_the_network():
    small = build_model("distill_dsm", in_channels=1, out_channels=2, width=0.5).cost()
    assert small.parameters < 1_216_266 / 3


def test_a_new_network_is_an_entry_and_a_module(monkeypatch, capsys):
    class Mean(SegmentationNetwork):
        """Every class is the image's mean."""

        def __init__(self, in_channels: int, out_channels: int, *, scale: float) -> None:
            super().__init__(in_channels, out_channels)
            self.stride, self.scale = (1, 1, 1), scale

        def forward(self, x, features=None):
            return self.scale * x.mean(dim=1, keepdim=True).expand(-1, self.out_channels, -1, -1, -1)

    entry = ModelEntry(summary="the mean of all channels", family="mean", fixed={}, options={"width": 2.0})
    monkeypatch.setitem(MODELS, "mean", entry)
    module = ModuleType("distilldsm.models.mean")
    module.build = lambda inputs, outputs, width: Mean(inputs, outputs, scale=width)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    network = build_model("mean", in_channels=2, out_channels=3, width=0.5)
    assert torch.equal(network(torch.ones(1, 2, 4, 5, 6)), torch.full((1, 3, 4, 5, 6), 0.5))
    with pytest.raises(ConfigError, match=r"options\.width: has an impossible value"):
        build_model("mean", in_channels=2, out_channels=3, width=0)
    assert main(["info", "--models"]) == 0
    assert "the mean of all channels" in capsys.readouterr().out


def test_importing_the_models_loads_no_torch():
    code = "import sys, distilldsm.models; from distilldsm.models import build_model; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
