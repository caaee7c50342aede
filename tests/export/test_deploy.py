"""The rearranged network is the same function."""

from __future__ import annotations

import pytest
import torch

from distilldsm.export.deploy import deployed
from tests.export.fake import CHANNELS, random_network


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet2d", {}),
        ("residual_dsm", {"add": True}),
        ("residual_dsm", {"add": False, "fraction": 0.25}),
        *(("distill_dsm", {"alpha": alpha}) for alpha in (0.0, 0.125, 0.3, 0.5, 1.0)),
    ],
)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_same_logits(name, options, depth):
    network = random_network(name, width=0.5, **options)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    image = torch.randn(1, CHANNELS, depth, 16, 32)
    with torch.no_grad():
        expected = network(image)
        found = deployed(network)(image)
        again = network(image)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, expected), "the network itself must not change"
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
