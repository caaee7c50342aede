"""A 2-D network of the user's as a network of the registry."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from distilldsm.config import ModelConfig
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import from_mapping, to_mapping
from distilldsm.inference.engines import TorchEngine
from distilldsm.inference.windows import predict_logits
from distilldsm.models import build_model
from tests.models.foreign import _torchvision
from tests.models.small import OWN, TwoLevels


def build(**options):
    return build_model("inserted", in_channels=2, out_channels=3, **{**OWN, **options})


def many_outputs(in_channels, out_channels):
    class Two(TwoLevels):
        def forward(self, x):
            return [super().forward(x)]

    return Two(in_channels, out_channels)


def of_fixed_classes(in_channels, out_channels):
    return TwoLevels(in_channels, 7)


def not_a_network(in_channels, out_channels):
    return in_channels


def without_a_place(in_channels, out_channels):
    return nn.Conv2d(in_channels, out_channels, 1)


def test_it_computes_what_the_2d_network_does():
    torch.manual_seed(0)
    network = build(arguments={"width": 16})
    assert network.training
    network.eval()
    flat = TwoLevels(2, 3, width=16).eval()
    flat.load_state_dict({k: network.state_dict()[own] for k, own in network.flat_names().items()})
    x = torch.randn(2, 2, 3, 8, 12)
    with torch.no_grad():
        assert torch.equal(network(x).transpose(1, 2).flatten(0, 1), flat(x.transpose(1, 2).flatten(0, 1)))
    assert (network.in_channels, network.out_channels, network.stride) == (2, 3, (1, 4, 4))
    assert network.inserted == ("down.2", "join.2")
    assert build(where=["down.*"]).inserted == ("down.0", "down.2")
    assert type(build(initialisation="paper").shifts[0]) is not type(network.shifts[0])


def test_a_block_that_is_used_three_times_reaches_three_slices():
    torch.manual_seed(0)
    network = build(builder="tests.models.small:Recurrent").eval()
    with torch.no_grad():
        for p in network.shifts.parameters():
            p.normal_()
    assert network.inserted == ("block.2",)
    image = torch.randn(2, 16, 8, 8)

    def reach() -> list[int]:
        changed = image.clone()
        changed[:, 8] += 1
        with torch.no_grad():
            difference = (network(changed[None]) - network(image[None]))[0].abs().amax(dim=(0, 2, 3))
        return difference.nonzero().flatten().tolist()

    assert network.depth_halo == 3
    assert reach() == list(range(5, 12))

    engine = TorchEngine(network)
    whole = predict_logits(engine, image.numpy())
    windowed = predict_logits(engine, image.numpy(), max_voxels=8 * 8 * 8)
    np.testing.assert_allclose(windowed, whole, rtol=0, atol=1e-5)
    assert build(builder="tests.models.small:Recurrent", arguments={"times": 0}).depth_halo == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("monai.networks.nets:BasicUNet", {"arguments": {"spatial_dims": 2, "features": (8, 8, 8, 8, 8, 8)}}),
        (
            "segmentation_models_pytorch:Unet",
            {"out_argument": "classes", "arguments": {"encoder_name": "resnet18", "encoder_weights": None}},
        ),
    ],
)
def test_networks_of_known_packages(name, options):
    _torchvision()  # which segmentation_models_pytorch imports
    pytest.importorskip(name.split(".")[0].split(":")[0])
    network = build_model("inserted", in_channels=2, out_channels=3, builder=name, **options).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 2, 3, 64, 32)).shape == (1, 3, 3, 64, 32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"builder": "tests.models.small"}, ["options.builder: ", "package.module:function"]),
        ({"builder": "tests.no_such:thing"}, ["cannot be imported", "ModuleNotFoundError", "PYTHONPATH"]),
        ({"builder": "tests.models.small:Nothing"}, ["cannot be imported", "Nothing"]),
        ({"builder": "tests.models.small:OWN"}, ["cannot be called"]),
        ({"in_argument": "in_channels"}, ["failed", "TypeError", "in_channels=2", "in_argument"]),
        ({"arguments": {"depth": 3}}, ["failed", "depth=3"]),
        ({"stride": 0}, ["options.stride: ", "at least 1"]),
        ({"stride": 2}, ["cannot compute", "sizes multiples of the stride 2", "hint"]),
        ({"arguments": [1]}, ["options.arguments: ", "a mapping"]),
        ({"alpha": 3}, ["alpha"]),
        ({"where": ["layer9"]}, ["matches no 2-D convolution", "layer9"]),
    ],
    ids=str,
)
def test_what_is_wrong_is_told(options, words):
    with pytest.raises(ConfigError) as caught:
        build(**options)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("many_outputs", ["does not return logits", "list", "(N, 3, H, W)", "a function of your own"]),
        ("of_fixed_classes", ["does not return logits", "(7,"]),
        ("not_a_network", ["does not return a network", "int"]),
        ("without_a_place", ["has no place for a depth shift"]),
    ],
)
def test_what_a_builder_must_return(function, words):
    with pytest.raises(ConfigError) as caught:
        build(builder=f"tests.models.test_inserted:{function}", in_argument="in_channels", out_argument="out_channels")
    for word in words:
        assert word in str(caught.value), caught.value


def test_parameters_hold_the_arguments():
    values = {"name": "inserted", "options": {**OWN, "arguments": {"width": 8.0, "sizes": [1, 2], "none": None}}}
    config = from_mapping(ModelConfig, values)  # KFP makes floats of whole numbers
    assert config.options["arguments"] == {"width": 8, "sizes": (1, 2), "none": None}
    assert type(config.options["arguments"]["width"]) is int
    assert from_mapping(ModelConfig, json.loads(json.dumps(to_mapping(config)))) == config
    for builder in (None, "", "os", ":x", "os:"):
        with pytest.raises(ConfigError, match=r"options.builder: (.|\n)*package.module:function"):
            ModelConfig(name="inserted", options={"builder": builder} if builder is not None else {})
