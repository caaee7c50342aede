"""insert_depth_shift: other people's 2-D networks as networks of volumes."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distilldsm.core.errors import ConfigError
from distilldsm.export.onnx_export import export_onnx
from distilldsm.models import build_model
from distilldsm.models.depth_shift import DepthModule, DistillDepthShift
from distilldsm.models.insert import AddedDistillDepthShift, GatedDepthShift, insert_depth_shift
from distilldsm.models.unet2d import UNet2D
from distilldsm.training.deep_supervision import DeeplySupervised, supervised_loss
from tests.models.foreign import CHANNELS, NAMES, network
from tests.models.small import Checkpointed, Heads, Many, Slices, Small


def random_modules(volumetric, seed: int = 1) -> None:
    """Modules that are not at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in volumetric.shifts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def tensors(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize("kind", ["distill", "residual", "shift"])
@pytest.mark.parametrize("name", NAMES)
def test_at_first_it_is_the_2d_network_and_then_it_is_not(name, kind):
    flat = network(name)
    before = copy.deepcopy(flat.state_dict())
    volumetric = insert_depth_shift(flat, kind=kind)
    assert flat.state_dict().keys() == before.keys()
    assert not any(m._forward_pre_hooks for m in flat.modules())
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


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_frozen_stays_frozen(in_place):
    """A network that is trained with its normalisation in evaluation mode."""
    flat = nn.Sequential(Small(), nn.BatchNorm2d(2)).train()
    flat[1].eval()
    x = torch.randn(2, 1, 3, 32, 32)
    expected = flat(x.transpose(1, 2).flatten(0, 1))
    volumetric = insert_depth_shift(flat, in_place=in_place)
    for _ in range(2):
        assert volumetric.training
        assert volumetric.network[0].training
        assert all(shift.training for shift in volumetric.shifts)
        assert not volumetric.network[1].training
        torch.testing.assert_close(volumetric(x).transpose(1, 2).flatten(0, 1), expected)
        volumetric.cost()  # looks at it in evaluation mode, and leaves it as it was
        volumetric.eval().train()  # as the training does in every epoch


def test_batchnorm_whose_weights_are_not_trained_keeps_its_statistics():
    """As in a pretrained network that comes in evaluation mode as a whole, as packages return it."""
    flat = nn.Sequential(Small(), nn.BatchNorm2d(2), nn.BatchNorm2d(2)).eval()
    flat[1].requires_grad_(False)
    supervised = DeeplySupervised(insert_depth_shift(flat), levels=2).train()
    supervised(torch.randn(1, 1, 3, 32, 32))
    fixed, trained = supervised.network.network[1], supervised.network.network[2]
    assert (fixed.running_mean == 0).all()
    assert (trained.running_mean != 0).all()


def test_it_trains_where_heads_below_are_wanted():
    supervised = DeeplySupervised(insert_depth_shift(Small()), levels=2)
    outputs = supervised(torch.randn(1, 1, 3, 32, 32))
    assert [o.shape for o in outputs] == [(1, 2, 3, 32, 32)]
    supervised_loss(outputs, torch.zeros(1, 3, 32, 32), lambda logits, _: logits.square().mean()).backward()
    assert all(p.grad is not None for p in supervised.parameters())


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        ("torchvision resnet18", 8, {f"layer{k}.{j}.conv2" for k in range(1, 5) for j in range(2)}),
        ("torchvision convnext", 18, {"features.1.0.block.0", "features.7.2.block.0"}),
        ("timm resnet", 4, {f"layer{k}.0.conv2" for k in range(1, 5)}),
        ("timm convnext", 12, {"stages.0.blocks.0.conv_dw", "stages.3.blocks.1.conv_dw"}),
        ("smp U-Net", 13, {"encoder.layer1.0.conv2", *(f"decoder.blocks.{k}.conv2.0" for k in range(5))}),
        (
            "MONAI BasicUNet",
            8,
            {f"{part}_{k}.convs.conv_1.conv" for part in ("down", "upcat") for k in range(1, 5)},
        ),
    ],
)
def test_where_modules_go(name, count, some):
    inserted = insert_depth_shift(network(name)).inserted
    assert len(inserted) == count
    assert some <= set(inserted)


def test_in_the_papers_unet_it_makes_the_papers_network():
    torch.manual_seed(0)
    own = build_model("distill_dsm", in_channels=4, out_channels=3).eval()
    flat = Slices().eval()
    flat.unet.load_state_dict({k: v for k, v in own.state_dict().items() if ".shift." not in k})
    volumetric = insert_depth_shift(flat, initialisation="paper", stride=16, out_channels=3)
    for module, theirs in zip(volumetric.shifts, (m for m in own.modules() if isinstance(m, DepthModule)), strict=True):
        module.load_state_dict(theirs.state_dict())
    assert volumetric.cost() == own.cost()
    assert volumetric.cost().parameters == 1_216_715
    assert volumetric.depth_halo == own.depth_halo
    x = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(volumetric(x), own(x))


def test_a_module_with_two_names_counts_once():
    twice = Small()
    twice.again = twice.second
    twice.inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    twice.same = twice.inner
    assert insert_depth_shift(twice).inserted == ("inner.1",)


def test_modules_compute_what_a_loop_over_slices_computes():
    torch.manual_seed(0)
    for module in (AddedDistillDepthShift(8), GatedDepthShift(8), GatedDepthShift(8, add=False)):
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
                    expected[4:] += module.gate[:, None, None] * (moved if module.add else moved - made(k))
                else:  # two stay, one comes from behind, one from before
                    expected[4:] += torch.cat((made(k)[:2], made(k + 1)[2:3], made(k - 1)[3:]))
                torch.testing.assert_close(out[here], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["distill", "residual", "shift"])
@pytest.mark.parametrize("initialisation", ["identity", "paper"])
def test_gradients(kind, initialisation):
    torch.manual_seed(0)
    volumetric = insert_depth_shift(Small().double(), kind=kind, initialisation=initialisation, stride=1)
    if initialisation == "identity" or kind == "distill":  # the others have no parameters
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


@pytest.mark.slow
def test_exports_keep_every_size_free(tmp_path):
    """A U-Net: tests/inference/test_depth_stream.py."""
    volumetric = insert_depth_shift(network("timm convnext"), out_channels=3)
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


def test_a_list_of_feature_maps_is_exported_as_one_output_each(tmp_path):
    volumetric = insert_depth_shift(network("timm resnet"))
    random_modules(volumetric)
    export_onnx(volumetric, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(1, 1, 3, 96, 64)
    with torch.no_grad():
        expected = volumetric(x)
    assert [o.name for o in session.get_outputs()] == ["logits", *(f"logits_{k}" for k in range(1, len(expected)))]
    for found, feature in zip(session.run(None, {"image": x.numpy()}), expected, strict=True):
        np.testing.assert_allclose(found, feature.numpy(), rtol=0, atol=2e-4 * max(1, float(feature.abs().max())))


def test_batch_and_depth_may_both_be_free_in_an_export(tmp_path):
    volumetric = insert_depth_shift(Small(), stride=1).eval()
    random_modules(volumetric)
    free = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.DYNAMIC)
    program = torch.export.export(volumetric, (torch.zeros(2, 1, 3, 4, 5),), dynamic_shapes=(free,), strict=False)
    torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in ((3, 5, 8, 6), (1, 2, 7, 9), (2, 1, 4, 4)):
        x = torch.randn(size[0], 1, *size[1:])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(found, volumetric(x).numpy(), rtol=0, atol=1e-5)


def test_compiled_it_is_one_graph_for_every_depth():
    volumetric = insert_depth_shift(Small(), stride=1).eval()
    random_modules(volumetric)
    compiled = torch.compile(volumetric, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for depth in (2, 5, 3):
            x = torch.randn(2, 1, depth, 8, 8)
            torch.testing.assert_close(compiled(x), volumetric(x), rtol=1e-5, atol=1e-5)


def test_threads_do_not_mix_up_their_depths():
    volumetric = insert_depth_shift(Small(), stride=1).eval()
    random_modules(volumetric)
    volumes = [torch.randn(1, 1, depth, 32, 32) for depth in (2, 3, 4, 6)]

    def run(x):
        with torch.no_grad():
            return volumetric(x)

    expected = [run(x) for x in volumes]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, volumes * 25))
    for k, y in enumerate(found):
        torch.testing.assert_close(y, expected[k % 4], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        volumetric = insert_depth_shift(Checkpointed(reentrant=reentrant), stride=1)
        random_modules(volumetric)
        volumetric(torch.randn(2, 1, 3, 8, 8)).square().sum().backward()
        gradients.append([p.grad for p in volumetric.parameters()])
    for others in gradients[1:]:
        for a, b in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_comes_out_keeps_its_containers():
    flat = Many().eval()
    x = torch.randn(2, 1, 3, 8, 8)
    with torch.no_grad():
        found = insert_depth_shift(flat, stride=1)(x)
        expected = flat(x.transpose(1, 2).flatten(0, 1))
    assert isinstance(found["heads"], Heads)
    assert found["pair"][1] is None
    assert found["out"].shape == found["heads"].mask.shape == (2, 2, 3, 8, 8)
    assert found["pair"][0].shape == (2, 2, 3)
    torch.testing.assert_close(found["pair"][0][1, :, 2], expected["pair"][0][5])
    torch.testing.assert_close(found["heads"].score, expected["heads"].score.view(2, 3))


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="no 2-D convolution"):
        insert_depth_shift(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no place"):
        insert_depth_shift(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 2, 1)))
    with pytest.raises(ConfigError, match="no place"):
        insert_depth_shift(Small(), where=lambda name, convolution: False)
    with pytest.raises(ConfigError, match=r"enough channels(.|\n)*alpha"):
        insert_depth_shift(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)))
    with pytest.raises(ConfigError, match="already"):
        insert_depth_shift(insert_depth_shift(Small()).network)
    with pytest.raises(ConfigError, match="already"):
        insert_depth_shift(UNet2D(1, 2, shift="distill"))
    with pytest.raises(RuntimeError, match="call the VolumetricNetwork"):
        insert_depth_shift(Small()).network(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ConfigError, match=r"matches no 2-D convolution(.|\n)*layer9"):
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
    assert insert_depth_shift(Small(), where="first").inserted == ("first",)
    flat = Small()
    chosen = insert_depth_shift(flat, where=lambda name, m: m.kernel_size == (1, 1), in_place=True)
    assert chosen.inserted == ("head",)
    assert chosen.network is flat


def test_the_documentation_runs(repository, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (repository / "docs" / "any-2d-network.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    exec(compile(code, "docs/any-2d-network.md", "exec"), {})
    assert "parameters" in capsys.readouterr().out
    assert (tmp_path / "model.xml").is_file()
