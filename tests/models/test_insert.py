"""insert_depth_shift: other people's 2-D networks as networks of volumes."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distilldsm.errors import ConfigError
from distilldsm.export.onnx_export import export_onnx
from distilldsm.models.depth_shift import DistillDepthShift
from distilldsm.models.insert import AddedDistillDepthShift, GatedDepthShift, insert_depth_shift
from tests.models.foreign import CHANNELS, NAMES, network


class Small(nn.Module):
    """Three convolutions, the last two of which can have a module; in-place ReLUs in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = torch.relu_(self.stem(x))
        x = torch.relu_(self.first(x))
        return self.head(torch.relu_(self.second(x)))


def random_modules(volumetric, seed: int = 1) -> None:
    """Modules that are not at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in volumetric.shifts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def tensors(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize("kind", ["distill", "residual"])
@pytest.mark.parametrize("name", NAMES)
def test_at_first_it_is_the_2d_network_and_then_it_is_not(name, kind):
    flat = network(name)
    before = copy.deepcopy(flat.state_dict())
    volumetric = insert_depth_shift(flat, kind=kind)
    assert flat.state_dict().keys() == before.keys()
    assert not flat._forward_pre_hooks
    x = torch.randn(2, CHANNELS.get(name, 1), 3, 64, 64)
    slices = x.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        found, expected = tensors(volumetric(x)), tensors(flat(slices))
    for a, b in zip(found, expected, strict=True):
        assert a.shape[:3] == (2, b.shape[1], 3)
        torch.testing.assert_close(a.transpose(1, 2).flatten(0, 1), b, rtol=0, atol=1e-6)
    sum(t.square().mean() for t in tensors(volumetric(x))).backward()
    assert sum(float(p.grad.abs().sum()) for p in volumetric.shifts.parameters()) > 0
    random_modules(volumetric)
    with torch.no_grad():
        changed = x.clone()
        changed[:, :, 0] += 1
        difference = tensors(volumetric(changed))[-1] - tensors(volumetric(x))[-1]
    assert float(difference[:, :, 1].abs().max()) > 0  # a slice hears of its neighbour


@pytest.mark.parametrize(
    ("name", "some", "never"),
    [
        ("torchvision resnet18", {"layer1.0.conv2", "layer4.1.conv2"}, {"conv1", "layer1.0.conv1", "layer2.0.conv1"}),
        ("torchvision convnext", {"features.7.2.block.0"}, {"features.0.0"}),
        ("smp U-Net", {"encoder.layer1.0.conv2", "decoder.blocks.0.conv2.0"}, {"segmentation_head.0"}),
        ("MONAI BasicUNet", {"down_1.convs.conv_1.conv", "upcat_4.convs.conv_1.conv"}, {"final_conv"}),
    ],
)
def test_where_modules_go(name, some, never):
    inserted = set(insert_depth_shift(network(name)).inserted)
    assert some <= inserted
    assert not never & inserted
    assert not any("downsample" in place or "shortcut" in place for place in inserted)


def test_modules_compute_what_a_loop_over_slices_computes():
    torch.manual_seed(0)
    for module, alpha in ((AddedDistillDepthShift(8, alpha=0.5), 4), (GatedDepthShift(8, fraction=0.5), 4)):
        with torch.no_grad():
            for p in module.parameters():
                p.normal_()
        x = torch.randn(2 * 5, 8, 4, 4)
        out = module(x, 5)
        for volume in range(2):
            for k in range(5):
                here = volume * 5 + k

                def made(i, volume=volume, module=module, x=x):
                    if not 0 <= i < 5:
                        return torch.zeros(4, 4, 4)
                    last = x[volume * 5 + i, 4:]
                    return last if isinstance(module, GatedDepthShift) else module.distil.convolution(last[None])[0]

                expected = x[here].clone()
                if isinstance(module, GatedDepthShift):
                    moved = torch.cat((made(k + 1)[:2], made(k - 1)[2:]))
                    expected[4:] += module.gate[:, None, None] * moved
                else:  # two stay, one comes from behind, one from before
                    expected[4:] += torch.cat((made(k)[:2], made(k + 1)[2:3], made(k - 1)[3:]))
                torch.testing.assert_close(out[here], expected, rtol=1e-5, atol=1e-5)
        assert alpha == 4


@pytest.mark.parametrize("kind", ["distill", "residual"])
@pytest.mark.parametrize("initialisation", ["identity", "paper"])
def test_gradients(kind, initialisation):
    torch.manual_seed(0)
    volumetric = insert_depth_shift(Small().double(), kind=kind, initialisation=initialisation, stride=1)
    random_modules(volumetric)
    x = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(volumetric, (x,), atol=1e-5)


def test_volumes_of_a_batch_and_their_depths_are_their_own():
    volumetric = insert_depth_shift(Small(), stride=1).eval()
    random_modules(volumetric)
    with torch.no_grad():
        for depth in (1, 2, 5):
            x = torch.randn(3, 1, depth, 8, 8)
            together = volumetric(x)
            assert together.shape == (3, 2, depth, 8, 8)
            alone = torch.cat([volumetric(one[None]) for one in x])
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
        far = torch.randn(1, 1, 9, 8, 8)
        moved = far.clone()
        moved[:, :, 0] += 1
        difference = (volumetric(moved) - volumetric(far)).abs().amax(dim=(0, 1, 3, 4))
    assert float(difference[volumetric.depth_halo]) >= 0
    assert float(difference[volumetric.depth_halo + 1 :].max()) == 0


def test_it_learns_what_the_2d_network_cannot():
    """The target is the next slice's content."""
    torch.manual_seed(0)
    losses = {}
    for volumetric in (True, False):
        net = insert_depth_shift(Small(), stride=1, where=["first", "second"])
        if not volumetric:
            net.shifts.requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(150):
            x = torch.randn(2, 1, 6, 8, 8, generator=generator)
            loss = (net(x)[:, 0, :-1] - x[:, 0, 1:]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[volumetric] = float(loss.detach())
    assert losses[False] > 0.9
    assert losses[True] < 0.5


def test_copies_and_saved_weights(tmp_path):
    volumetric = insert_depth_shift(Small(), stride=1).eval()
    random_modules(volumetric)
    x = torch.randn(1, 1, 4, 8, 8)
    with torch.no_grad():
        expected = volumetric(x)
        duplicate = copy.deepcopy(volumetric)
        torch.testing.assert_close(duplicate(x), expected, rtol=0, atol=0)
        random_modules(volumetric, seed=2)
        assert not torch.equal(volumetric(x), expected)
        torch.testing.assert_close(duplicate(x), expected, rtol=0, atol=0)  # a copy has modules of its own
        save_file(duplicate.state_dict(), tmp_path / "w.safetensors")
        again = insert_depth_shift(Small(), stride=1).eval()
        again.load_state_dict(load_file(tmp_path / "w.safetensors"))
        torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
        # The 2-D network's own names are kept: weights of it load before and after.
        again.network.load_state_dict(Small().state_dict())


@pytest.mark.parametrize("name", ["smp U-Net", "MONAI BasicUNet", "timm convnext"])
def test_exports_keep_every_size_free(name, tmp_path):
    volumetric = insert_depth_shift(network(name), out_channels=3)
    random_modules(volumetric)
    path = tmp_path / "model.onnx"
    export_onnx(volumetric, path)
    session = onnxruntime.InferenceSession(path)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in ((2, 64, 96), (5, 96, 64)):
        x = torch.randn(1, 1, *size)
        with torch.no_grad():
            expected = volumetric(x).numpy()
        scale = float(np.abs(expected).max())
        for found in (session.run(None, {"image": x.numpy()})[0], compiled([x.numpy()])[0]):
            np.testing.assert_allclose(found, expected, atol=2e-4 * max(scale, 1))


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="no 2-D convolution"):
        insert_depth_shift(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no place"):
        insert_depth_shift(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)))
    with pytest.raises(ConfigError, match=r"names no 2-D convolution(.|\n)*layer9"):
        insert_depth_shift(Small(), where=["first", "layer9.*"])
    with pytest.raises(ConfigError, match="kind"):
        insert_depth_shift(Small(), kind="both")
    with pytest.raises(ConfigError, match="initialisation"):
        insert_depth_shift(Small(), initialisation="zeros")
    with pytest.raises(ConfigError, match="alpha"):
        insert_depth_shift(Small(), alpha=2.0)
    with pytest.raises(ValueError, match="multiples"):
        insert_depth_shift(Small())(torch.zeros(1, 1, 2, 30, 32))


def test_patterns_choose_and_the_papers_module_can_be_had():
    volumetric = insert_depth_shift(Small(), where=["se*"], initialisation="paper")
    assert volumetric.inserted == ("second",)
    assert isinstance(volumetric.shifts[0], DistillDepthShift)


def test_the_documentation_runs(repository, capsys):
    text = (repository / "docs" / "any-2d-network.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "docs/any-2d-network.md", "exec"), {})
    assert "parameters" in capsys.readouterr().out
