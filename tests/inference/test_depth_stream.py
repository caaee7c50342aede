"""A volume a few slices at a time: the logits of the whole volume at once, whatever the network and the chunk."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distilldsm.export.onnx_export import export_onnx
from distilldsm.inference.depth_stream import NotStreamableError, stream_graph
from distilldsm.inference.engines import OpenVINOEngine, TorchEngine
from distilldsm.inference.loading import load_exported
from distilldsm.inference.probabilities import Ensemble, Member
from distilldsm.inference.windows import padded_size, predict_logits, stream_windows
from distilldsm.models import unet2d
from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.depth_shift import masked_depth_shift
from distilldsm.models.insert import insert_depth_shift
from distilldsm.models.unet2d import UNet2D
from tests.export.fake import exported, random_network
from tests.models.foreign import network as foreign
from tests.models.test_insert import random_modules

OURS = {
    "distill_dsm": {},
    "distill_dsm, alpha 1": {"alpha": 1.0},
    "residual_dsm": {},
    "residual_dsm without the addition": {"add": False},
}


def half_width(name: str) -> SegmentationNetwork:
    """The network that tests/export/fake.py exports, or another of its size."""
    return random_network(name, width=0.5, **OURS[name])


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Exported networks, made when first asked for."""
    made: dict[str, OpenVINOEngine] = {}

    def get(name: str) -> OpenVINOEngine:
        if name not in made:
            path = tmp_path_factory.mktemp("stream") / "model.onnx"
            if name == "distill_dsm":
                network, path = half_width(name), exported(tmp_path_factory).export / "model.onnx"
            elif name in OURS:
                network = half_width(name)
                export_onnx(network, path)
            else:
                network = insert_depth_shift(foreign(name))
                random_modules(network)
                export_onnx(network, path)
            made[name] = OpenVINOEngine(path, network)
        return made[name]

    return get


def streamed(engine: OpenVINOEngine, image: np.ndarray, count: int) -> np.ndarray:
    depth, shape = image.shape[2], (1, image.shape[1], count, *image.shape[3:])
    lag = engine.depth_halo
    stream, parts = engine.open_stream(shape), []
    for part in stream_windows(depth, count, lag):
        chunk = np.zeros(shape, dtype=np.float32)
        there = image[:, :, part.low : part.high]
        chunk[:, :, : there.shape[2]] = there
        logits = stream(chunk, part.low, depth)
        first = part.low - lag
        parts.append(logits[:, :, part.start - first : part.stop - first])
    return np.concatenate(parts, axis=2)


@pytest.mark.parametrize(
    ("name", "depth", "count", "size"),
    [
        ("distill_dsm", 1, 4, (16, 16)),
        ("distill_dsm", 11, 1, (32, 16)),
        ("distill_dsm", 20, 9, (16, 48)),
        ("residual_dsm", 8, 8, (32, 48)),
        ("residual_dsm", 13, 5, (16, 16)),
    ],
)
def test_logits_are_those_of_the_whole_volume(engines, name, depth, count, size):
    image = np.random.default_rng(depth).normal(size=(1, 2, depth, *size)).astype(np.float32)
    expected = engines(name)(image)
    found = streamed(engines(name), image, count)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from([*OURS, "distill_dsm, alpha 0"]),
    shape=st.tuples(st.integers(1, 20), st.sampled_from((7, 16)), st.sampled_from((16, 33))),
    slices=st.integers(1, 12),
)
def test_pytorch_streams_the_same(name, shape, slices):
    network = random_network(name.split()[0].rstrip(","), **OURS.get(name, {"alpha": 0.0}))
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    expected = predict_logits(TorchEngine(network), image)
    area = math.prod(padded_size(shape, network.stride)[1:])
    with patch.object(UNet2D, "forward", autospec=True, side_effect=UNet2D.forward) as whole:
        found = predict_logits(TorchEngine(network), image, max_voxels=slices * area)
    assert whole.call_count == (shape[0] <= slices), "in one piece if it fits, else never as a whole"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


VARIANTS = {
    "distill_dsm, alpha 1, encoder": {"alpha": 1.0, "shift_at": "encoder"},
    "distill_dsm, decoder, identity": {"shift_at": "decoder", "initialisation": "identity", "alpha": 0.3},
    "distill_dsm, levels, identity": {"shift_at": (0, 2), "initialisation": "identity"},
    "residual_dsm, encoder, identity": {"shift_at": "encoder", "initialisation": "identity", "add": False},
}
EXPORTED = ("distill_dsm, levels, identity", "residual_dsm, encoder, identity")
"""Both kinds of module, on some levels and on one side; an export takes many seconds."""


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_modules_elsewhere_and_another_start(name, tmp_path, monkeypatch):
    monkeypatch.setattr(unet2d, "PAPER_WIDTHS", (16, 16, 32))
    network = random_network(name.split(",")[0], **VARIANTS[name])
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if ".shift." in parameter_name:
                parameter.normal_(std=0.2)
    image = np.random.default_rng(0).normal(size=(1, 2, 13, 16, 32)).astype(np.float32)
    expected = TorchEngine(network)(image)
    tolerance = {"rtol": 0, "atol": 1e-4 * np.abs(expected).max()}
    for slices in (1, 4):
        found = predict_logits(TorchEngine(network), image[0], max_voxels=slices * 16 * 32)
        np.testing.assert_allclose(found, expected[0], **tolerance)
    if name not in EXPORTED:
        return
    engine = made(network, tmp_path, network.depth_halo)
    np.testing.assert_allclose(engine(image), expected, **tolerance)
    assert stream_graph(engine._model, (1, 2, 4, 16, 32)).lag == network.depth_halo
    for slices in (1, 4):
        np.testing.assert_allclose(streamed(engine, image, slices), expected, **tolerance)


def test_a_network_without_shifts_goes_in_windows_and_a_foreign_one_too():
    for network in (random_network("unet2d"), insert_depth_shift(foreign("smp U-Net"))):
        assert TorchEngine(network).open_stream((1, 2, 8, 16, 16)) is None


@pytest.mark.slow
def test_other_networks_too(engines):
    """As it is exported, the depth shift inserted: the network's logits for any size, at once and in a stream."""
    name = "smp U-Net"  # MONAI's: tests/test_data_sets.py
    network = insert_depth_shift(foreign(name))
    random_modules(network)
    for size in ((2, 96, 64), (11, 64, 96)):
        image = np.random.default_rng(0).normal(size=(1, 1, *size)).astype(np.float32)
        expected = engines(name)(image)
        with torch.no_grad():
            exact = network(torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(expected, exact, rtol=0, atol=2e-4 * max(np.abs(exact).max(), 1))
    np.testing.assert_allclose(streamed(engines(name), image, 4), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_volume_does_not_see_the_one_before(engines):
    engine, rng = engines("distill_dsm"), np.random.default_rng(0)
    one, two = (rng.normal(size=(1, 2, n, 16, 16)).astype(np.float32) for n in (7, 5))
    first = streamed(engine, one, 3)
    second = streamed(engine, two, 3)
    np.testing.assert_array_equal(streamed(engine, one, 3), first)
    np.testing.assert_allclose(second, engine(two), rtol=0, atol=1e-5 * np.abs(second).max())


def test_two_volumes_at_once_and_one_that_is_broken_off(engines):
    engine, shape = engines("distill_dsm"), (1, 2, 4, 16, 16)
    one, two = np.random.default_rng(0).normal(size=(2, 1, 2, 12, 16, 16)).astype(np.float32)
    first, second, broken_off = (engine.open_stream(shape) for _ in range(3))
    broken_off(one[:, :, :4], 0, 12)
    found = [[], []]
    for part in stream_windows(12, 4, 8):
        for stream, image, parts in ((first, one, found[0]), (second, two, found[1])):
            chunk = np.zeros(shape, dtype=np.float32)
            there = image[:, :, part.low : part.high]
            chunk[:, :, : there.shape[2]] = there
            parts.append(stream(chunk, part.low, 12))
    for image, parts in ((one, found[0]), (two, found[1])):
        np.testing.assert_allclose(np.concatenate(parts, axis=2)[:, :, 8:], engine(image), rtol=0, atol=1e-4)


def test_another_lag_compiles_nothing_and_whole_volumes_stay_compiled(engines):
    engine, compiled = engines("residual_dsm"), []
    engine(np.zeros((1, 2, 3, 16, 16), dtype=np.float32))
    with patch.object(engine, "_core", SimpleNamespace(compile_model=lambda *a: compiled.append(a) or MagicMock())):
        engine.depth_halo = 7
        assert engine.open_stream((1, 2, 8, 32, 32)) is None
        assert not compiled
        engine.depth_halo = 8
        engine.open_stream((1, 2, 8, 32, 32))
        engine.open_stream((1, 2, 8, 32, 32))
        engine(np.zeros((1, 2, 3, 16, 16), dtype=np.float32))
        assert len(compiled) == 1
    engine.release()


def test_threads_share_an_engine(engines):
    engine = engines("distill_dsm")
    images = np.random.default_rng(0).normal(size=(4, 1, 2, 6, 32, 32)).astype(np.float32)
    expected = [engine(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine, images))
    np.testing.assert_array_equal(found, expected)


def test_what_is_kept_is_what_a_slice_must_wait_for(engines):
    """Of half the paper's widths: two slices for each shift, one of what passes by, and the skip connections."""
    shifted = [(8, 2), (16, 4), (32, 8), (32, 16), (32, 8), (16, 4), (8, 2), (4, 1)]
    """Distilled channels (half of the block's) and the level's reduction in plane."""
    skips = [(8, 1, 7), (16, 2, 5), (32, 4, 3), (64, 8, 1)]
    """Channels, reduction, and the shifts between the two ends."""
    size = 64 * 32
    expected = sum(2 * c * size // r**2 for c, r in shifted) + sum(n * c * size // r**2 for c, r, n in skips)
    # The channels that pass by are added after a convolution, when they have the channels of the block's output.
    passing = [(16, 2), (32, 4), (64, 8), (64, 16), (32, 8), (16, 4), (8, 2), (8, 1)]
    expected += sum(c * size // r**2 for c, r in passing)
    for count in (1, 8):
        assert engines("distill_dsm").stream_bytes((1, 2, count, 64, 32)) == 4 * expected
    engine = TorchEngine(half_width("distill_dsm"))
    stream = engine.open_stream((1, 2, 4, 64, 32))
    stream(np.zeros((1, 2, 4, 64, 32), dtype=np.float32), 0, 4)
    assert engine.stream_bytes((1, 2, 4, 64, 32)) == sum(4 * kept.numel() for kept in stream._kept)


class Slices(SegmentationNetwork):
    """One shift each way, then `after` on slices (D, 8, H, W), then a head; every operation by name below."""

    def __init__(self, after, *, dtype=torch.float32, shift=True) -> None:
        super().__init__(8, 2)
        self.after, self.dtype, self.shift = after, dtype, shift
        self.head = nn.Conv2d(8, 2, kernel_size=1)

    def forward(self, x, features=None):
        _, channels, depth, height, width = x.shape
        x = x.transpose(1, 2).reshape(depth, channels, height, width)
        shifted = masked_depth_shift(x.to(self.dtype), depth, 2, 2) if self.shift else x
        x = self.after(shifted.float(), depth)
        return self.head(x).reshape(1, depth, 2, height, width).transpose(1, 2)


def volume(slices):
    """(D, 8, H, W) as (8, D, H, W), as many channels as slices at a time."""
    return slices.transpose(0, 1)


APART = {
    "nothing": lambda x, depth: x,
    "another shift": lambda x, depth: masked_depth_shift(x, depth, 4, 4),
    "a mean in plane": lambda x, depth: x - x.mean(dim=(2, 3), keepdim=True),
    "channels last": lambda x, depth: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    "a norm without eps": lambda x, depth: masked_depth_shift(x / x.abs().mean((1, 2, 3), keepdim=True), depth, 4, 4),
}
TOGETHER = {
    "a mean of all slices": lambda x, depth: x - x.mean(dim=0, keepdim=True),
    "that mean, channels first": lambda x, depth: volume(volume(x) - volume(x).mean(dim=1, keepdim=True)),
    "turned round": lambda x, depth: x + x.flip(0),
    "turned round, channels first": lambda x, depth: volume(volume(x) + volume(x).flip(1)),
    "the number of the slice": lambda x, depth: x + torch.arange(depth, dtype=torch.float32).view(-1, 1, 1, 1),
    "how many slices": lambda x, depth: x / depth,
    "how many tens of slices": lambda x, depth: x * (1 + depth // 10),
    "a shift by two": lambda x, depth: F.pad(x, (0, 0, 0, 0, 0, 0, 2, -2)),
    "a padding of a padding": lambda x, depth: F.pad(F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)), (0, 0, 0, 0, 0, 0, -1, 1)),
    "a shift that copies the end": lambda x, depth: torch.cat((x[:1], x[:-1])),
    "a convolution over slices": lambda x, depth: volume(F.conv3d(volume(x)[None], EDGES, padding=(1, 0, 0))[0]),
}
EDGES = torch.tensor([1.0, -1.0, 0.5]).reshape(1, 1, 3, 1, 1).repeat(8, 8, 1, 1, 1)


def made(network, folder, halo: int = 1) -> OpenVINOEngine:
    export_onnx(network.eval(), folder / "model.onnx")
    return OpenVINOEngine(folder / "model.onnx", SimpleNamespace(stride=network.stride, depth_halo=halo))


@pytest.mark.parametrize("after", APART)
def test_operations_that_keep_slices_apart(after, tmp_path):
    engine = made(Slices(APART[after]), tmp_path, halo=2 if "shift" in after or "eps" in after else 1)
    image = np.random.default_rng(0).normal(size=(1, 8, 11, 6, 5)).astype(np.float32)
    for count in (1, 4, 8):
        np.testing.assert_allclose(streamed(engine, image, count), engine(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("after", TOGETHER)
def test_operations_that_mix_them_are_refused(after, tmp_path):
    engine = made(Slices(TOGETHER[after]), tmp_path)
    for count in (1, 4, 8):
        with pytest.raises(NotStreamableError):
            stream_graph(engine._model, (1, 8, count, 6, 5))


def test_a_network_without_shifts_is_refused(tmp_path):
    engine = made(Slices(APART["nothing"], shift=False), tmp_path)
    with pytest.raises(NotStreamableError):
        stream_graph(engine._model, (1, 8, 16, 6, 5))
    assert engine.stream_bytes((1, 8, 16, 6, 5)) is None


def test_only_float32_is_kept(tmp_path):
    engine = made(Slices(APART["nothing"], dtype=torch.float64), tmp_path)
    with pytest.raises(NotStreamableError):
        stream_graph(engine._model, (1, 8, 4, 6, 5))


def test_averages_are_not_streamed(tmp_path_factory):
    made = exported(tmp_path_factory)
    shape = (1, 2, 8, 32, 32)
    for runtime in ("openvino", "torch"):
        network = load_exported(made.export, runtime=runtime).network
        (member,) = network.members
        assert network.stream_bytes(shape)
        for members in ([member] * 2, [Member(member.engine, ("height",))]):
            assert Ensemble(members).stream_bytes(shape) is None
            assert Ensemble(members).open_stream(shape) is None
    for other in ({"runtime": "onnx"}, {"precision": "int8"}):
        assert load_exported(made.export, **other).network.stream_bytes(shape) is None
