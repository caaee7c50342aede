"""The engines: the same contract, clear errors."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import save_file

from distilldsm.core.errors import DataError
from distilldsm.inference import engines
from distilldsm.inference.engines import OnnxEngine, OpenVINOEngine, TorchEngine
from distilldsm.inference.windows import predict_logits
from distilldsm.models.checkpoint import load_tensors, save_tensors
from tests.export.fake import CHANNELS, NETWORK, exported, random_network


def image(depth: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, CHANNELS, depth, 16, 32)).astype(np.float32)


def test_torch_runs_in_evaluation_mode_without_gradients():
    network = random_network("distill_dsm", width=0.25).train()
    engine = TorchEngine(network)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    first, again = engine(image(3)), engine(image(3))
    assert not network.training
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert all((before[k] == v).all() for k, v in network.state_dict().items()), "no statistic may move"


def test_torch_bf16_is_close_and_comes_back_as_float32():
    network = random_network("unet2d", width=0.25)
    exact, rough = TorchEngine(network)(image(2)), TorchEngine(network, bf16=True)(image(2))
    assert rough.dtype == np.float32
    difference = np.abs(exact - rough).max() / np.abs(exact).max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize(
    "make", [lambda d: OnnxEngine(d / "model.onnx", NETWORK), lambda d: OpenVINOEngine(d / "model.xml", NETWORK)]
)
def test_results_survive_the_next_call(make, tmp_path_factory):
    engine = make(exported(tmp_path_factory).export)
    first = engine(image(2))
    kept = first.copy()
    second = engine(image(2, seed=1))
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)
    # Any memory layout of the input will do.
    np.testing.assert_array_equal(engine(np.asfortranarray(image(2))), kept)


def test_openvino_compiled_for_a_size_gives_the_same_logits(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(engines, "FIXED_FROM_VOXELS", 4 * 16 * 32)
    path = exported(tmp_path_factory).export / "model.xml"
    free, fixed = OpenVINOEngine(path, NETWORK), OpenVINOEngine(path, NETWORK, fixed_size=True)
    for depth in (3, 17, 4, 3):
        np.testing.assert_array_equal(fixed(image(depth)), free(image(depth)))
        assert fixed._shape == ((1, CHANNELS, depth, 16, 32) if depth >= 4 else None)
        assert free._shape is None


def test_openvino_may_choose_its_precision(tmp_path_factory):
    path = exported(tmp_path_factory).export / "model.xml"
    exact, free = OpenVINOEngine(path, NETWORK)(image(2)), OpenVINOEngine(path, NETWORK, precision="auto")(image(2))
    assert np.abs(exact - free).max() < 0.2 * np.abs(exact).max()


@pytest.mark.parametrize(("engine", "name"), [(OnnxEngine, "model.onnx"), (OpenVINOEngine, "model.xml")])
def test_missing_and_damaged_models_are_named(engine, name, tmp_path):
    with pytest.raises(DataError, match="model file not found"):
        engine(tmp_path / name, NETWORK)
    (tmp_path / name).write_bytes(b"no model")
    with pytest.raises(DataError, match=f"{name}: cannot be loaded by"):
        engine(tmp_path / name, NETWORK)


def test_signals_still_work_after_engines_are_gone(tmp_path_factory):
    """Engines dropped in the order they were made; then a signal, as when a child process ends."""
    code = (
        "import os, signal, sys\n"
        "from types import SimpleNamespace\n"
        "from distilldsm.inference.engines import OpenVINOEngine\n"
        "network = SimpleNamespace(stride=(1, 16, 16), depth_halo=8)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "engines = [OpenVINOEngine(sys.argv[1], network) for _ in range(2)]\n"
        "while engines:\n"
        "    engines.pop(0)\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    path = str(exported(tmp_path_factory).export / "model.xml")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_stop_every_engine(value, tmp_path_factory, tmp_path):
    """A bad weight of the first layer reaches no output where ReLU turns NaN into zero."""
    import onnx
    import openvino

    model = onnx.load(exported(tmp_path_factory).export / "model.onnx")
    first = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weights = onnx.numpy_helper.to_array(first).copy()
    weights.flat[0] = value
    first.CopyFrom(onnx.numpy_helper.from_array(weights, first.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(DataError, match=r"outputs are not finite"):
        predict_logits(OnnxEngine(tmp_path / "model.onnx", NETWORK), image(3)[0])
    model = openvino.convert_model(tmp_path / "model.onnx")
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)  # half precision would lose NaN
    with pytest.raises(DataError, match=r"model\.xml: cannot be loaded(.|\n)*are not finite"):
        OpenVINOEngine(tmp_path / "model.xml", NETWORK)
    network = random_network("distill_dsm", width=0.25)
    next(network.parameters()).data.flatten()[0] = value
    with pytest.raises(DataError, match=r"1 of .* tensors are not finite"):
        save_tensors(tmp_path / "last.safetensors", network.state_dict(), {})
    save_file(network.state_dict(), tmp_path / "last.safetensors")
    with pytest.raises(DataError, match=r"last\.safetensors: 1 of .* tensors are not finite"):
        load_tensors(tmp_path / "last.safetensors")
    with pytest.raises(DataError, match="outputs are not finite"):
        predict_logits(TorchEngine(network), image(3)[0])
