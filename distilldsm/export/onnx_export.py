"""Write a network into one self-contained ONNX file. Depth, height and width may vary."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distilldsm.core.errors import UserError

if TYPE_CHECKING:
    from distilldsm.models.base import SegmentationNetwork

OPSET = 20
INPUT, OUTPUT = "image", "logits"
SPATIAL_AXES = ("depth", "height", "width")


def export_onnx(network: SegmentationNetwork, path: str | os.PathLike[str]) -> None:
    """Write a network as ONNX: `image` (1, C, D, H, W) float32 to `logits` (1, K, D, H, W) float32.

    Depth, height and width may vary (multiples of the network's stride). The batch is 1, because prediction runs
    volume by volume. A `VolumetricNetwork` around a classifier returns (1, K, D). Several output tensors are named
    `logits`, `logits_1` and so on. The network is traced on the CPU, in evaluation mode.

    Raises:
        UserError: the file is not valid, has a fixed size or stores weights in another file.
        torch's own error: the network's code fixes a size; only a change of that code helps.
    """
    import onnx
    import torch

    from distilldsm.export.deploy import deployed

    sizes = _example_sizes(network.stride)
    image = torch.zeros(1, network.in_channels, *sizes)
    dynamic = {
        axis: torch.export.Dim.DYNAMIC if step == 1 else step * torch.export.Dim(name, min=1, max=4096)
        for axis, (name, step) in enumerate(zip(SPATIAL_AXES, network.stride, strict=True), start=2)
    }
    network = deployed(network)
    with _quiet():
        # Two steps, because torch.onnx.export alone does not fail when a size gets fixed: it silently tries other ways
        # of tracing.
        program = torch.export.export(network, (image,), dynamic_shapes=(dynamic,), strict=False)
        outputs = [f"{OUTPUT}_{k}" if k else OUTPUT for k in range(len(program.graph_signature.user_outputs))]
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=outputs, verbose=False
        )
    assert exported is not None
    model = exported.model_proto
    _tidy(model)
    check_onnx(model, path=path)
    onnx.save_model(model, os.fspath(path), save_as_external_data=False)


def check_onnx(model: Any, *, path: str | os.PathLike[str]) -> None:
    """Check an ONNX model: it is valid, the spatial sizes of input and output may vary, all weights are inside.

    Raises:
        UserError: a check fails; the message names `path`.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise UserError("is not a valid ONNX model", where=path, seen=str(error)[:300]) from None
    for value in (*model.graph.input, *model.graph.output):
        sizes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        free = all(size in (axis, f"{value.name}_{axis}") for size, axis in zip(sizes[2:], SPATIAL_AXES, strict=False))
        if sizes[0] != 1 or not isinstance(sizes[1], int) or not free:
            raise UserError(
                f"the exporter fixed a size of '{value.name}'",
                where=path,
                seen=sizes,
                rule="(1, channels, depth, height, width) with the last three free; a classifier's ends with the depth",
            )
    outside = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise UserError("stores weights in another file", where=path, seen=outside[0], rule="one file")


def _example_sizes(stride: tuple[int, int, int]) -> list[int]:
    """Sizes for tracing. All differ, and none is 1 at any level, because tracing treats a 1 as a constant."""
    return [max(3, -(-size // step)) * step for size, step in zip((5, 64, 80), stride, strict=True)]


def _tidy(model: Any) -> None:
    """Name the free sizes. Remove the exporter's notes on the source code (paths of this machine, stack traces)."""
    import onnx

    image = [size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim]
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in zip(range(2, len(value.type.tensor_type.shape.dim)), SPATIAL_AXES, strict=False):
            size = value.type.tensor_type.shape.dim[axis]
            # The exporter's names are like s53 or 16*height. A fixed size stays fixed, so that the check finds it.
            if size.HasField("dim_param"):
                size.dim_param = name if size.dim_param == image[axis] else f"{value.name}_{name}"
    # Shapes of inner tensors still use the old names. Runtimes infer these shapes anyway.
    del model.graph.value_info[:]
    for node in model.graph.node:
        _pad_instead_of_rounding_up(node)
    for item in (model, model.graph, *model.graph.node, *model.graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    onnx.helper.set_model_props(model, {"intended_use": "research; not a medical device"})


def _pad_instead_of_rounding_up(node: Any) -> None:
    """Write a 2x2 max-pooling that rounds sizes up as one that pads the end by 1. The values are the same.

    OpenVINO refuses to round up the size 1, which small images have at the coarse levels.
    """
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "MaxPool" and attributes["ceil_mode"].i and list(attributes["kernel_shape"].ints) == [2, 2]:
        attributes["ceil_mode"].i = 0
        attributes["pads"].ints[:] = [0, 0, 1, 1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages about packages that are not needed. Errors are still shown."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
