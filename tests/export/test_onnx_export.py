"""Every network of the registry, exported, says on any size what it says in PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from distilldsm.config.networks import MODEL_NAMES
from distilldsm.core.errors import DataError, UserError
from distilldsm.export.onnx_export import SPATIAL_AXES, check_onnx, export_onnx
from distilldsm.export.openvino_export import export_openvino
from distilldsm.inference.engines import OnnxEngine, OpenVINOEngine, TorchEngine
from distilldsm.models import unet2d
from distilldsm.models.base import SegmentationNetwork
from tests.export.fake import CHANNELS, CLASSES, exported, random_network
from tests.models.small import NEEDED

# (D, H, W), rounded up to the stride: sizes that are odd, at once or at some level.
SIZES = ((1, 5, 7), (2, 16, 44), (7, 33, 27))
ONNX_TOLERANCE = 1e-4
"""Largest difference of logits that reach about 10: float32 sums in another order."""
FP16_TOLERANCE = 5e-2
"""Weights rounded to 11 bits, through a network of random weights."""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_runtimes_say_what_the_network_says(name, tmp_path, monkeypatch, tmp_path_factory):
    options = NEEDED.get(name, {"base_width": 4} if name == "unet3d" else {"width": 0.5})
    if name == "distill_dsm":
        onnx_path = exported(tmp_path_factory).export / "model.onnx"  # all five levels
    else:
        # Two levels trace in a third of the time of five, and hold every operation there is.
        monkeypatch.setattr(unet2d, "PAPER_WIDTHS", (16, 32))
        onnx_path = tmp_path / "model.onnx"
    network = random_network(name, **options)
    if name != "distill_dsm":
        export_onnx(network, onnx_path)
    export_openvino(onnx_path, tmp_path / "half.xml", fp16=True)
    export_openvino(onnx_path, tmp_path / "single.xml", fp16=False)
    assert (tmp_path / "half.bin").stat().st_size < 0.6 * (tmp_path / "single.bin").stat().st_size

    reference = TorchEngine(network)
    engines = {
        "onnx": (OnnxEngine(onnx_path, network), ONNX_TOLERANCE),
        "openvino": (OpenVINOEngine(tmp_path / "single.xml", network), ONNX_TOLERANCE),
        "openvino_fp16": (OpenVINOEngine(tmp_path / "half.xml", network), FP16_TOLERANCE),
    }
    rng = np.random.default_rng(0)
    for size in SIZES:
        shape = [-(-n // s) * s for n, s in zip(size, network.stride, strict=True)]
        image = rng.normal(size=(1, CHANNELS, *shape)).astype(np.float32)
        expected = reference(image)
        assert expected.std() > 0.1, "logits that hardly differ would make any comparison pass"
        for runtime, (engine, tolerance) in engines.items():
            found = engine(image)
            assert found.shape == (1, CLASSES, *shape)
            scale = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=f"{runtime} {size}")


def test_the_file_is_valid_self_contained_and_free_in_size(tmp_path_factory):
    model = onnx.load(exported(tmp_path_factory).export / "model.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {o.version for o in model.opset_import if o.domain == ""} == {20}
    for value, name, channels in (
        (model.graph.input[0], "image", CHANNELS),
        (model.graph.output[0], "logits", CLASSES),
    ):
        sizes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert (value.name, sizes) == (name, [1, channels, *SPATIAL_AXES])
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)


def test_the_file_tells_nothing_of_the_machine(tmp_path_factory, repository):
    export = exported(tmp_path_factory).export
    for name in ("model.onnx", "model.xml"):
        content = (export / name).read_bytes()
        for secret in (str(repository), ".py", str(export.parent)):
            assert secret.encode() not in content, f"{name} holds {secret}"


class FixedDepth(SegmentationNetwork):
    """Depends on its depth, as the product's networks must not."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.weight = torch.nn.Parameter(torch.ones(1, 1, 5, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_a_size_that_got_fixed_is_refused(tmp_path):
    with pytest.raises(Exception, match=r"(?i)constraint|speciali"):
        export_onnx(FixedDepth(), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def small_model(depth: int | str = "depth", *, external: bool = False) -> onnx.ModelProto:
    shape = [1, 2, depth, "height", "width"]
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("image", "logits")]
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [2.0])
    if external:
        weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="w.bin")
    node = onnx.helper.make_node("Mul", ["image", "w"], ["logits"])
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:], [weight])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_check_accepts_and_refuses(tmp_path):
    check_onnx(small_model(), path="model.onnx")
    with pytest.raises(UserError, match="fixed a size of 'image'"):
        check_onnx(small_model(5), path="model.onnx")
    with pytest.raises(UserError, match=r"weights in another file|not a valid ONNX"):
        check_onnx(small_model(external=True), path="model.onnx")
    broken = small_model()
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(UserError, match="not a valid ONNX"):
        check_onnx(broken, path="model.onnx")


def test_openvino_names_a_broken_model(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"model\.onnx: cannot be loaded by OpenVINO"):
        export_openvino(tmp_path / "model.onnx", tmp_path / "model.xml", fp16=True)
