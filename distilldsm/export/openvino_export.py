"""ONNX to OpenVINO IR."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from distilldsm.inference.engines import openvino_core, unloadable


def export_openvino(onnx_path: str | os.PathLike[str], xml_path: str | os.PathLike[str], *, fp16: bool) -> None:
    """Write OpenVINO IR (`.xml` and `.bin` beside it) of an ONNX model, its free sizes kept.

    Args:
        onnx_path: what `export_onnx` wrote.
        xml_path: the `.xml` to write.
        fp16: store the weights in half precision (half the size); computing stays what the runtime is asked for.

    Raises:
        DataError: OpenVINO cannot read the model.
    """
    import openvino

    # read_model and not convert_model: the same ONNX frontend, without that function's telemetry.
    try:
        model = openvino_core().read_model(os.fspath(onnx_path))
    except RuntimeError as error:
        raise unloadable("OpenVINO", onnx_path, error) from None
    _name_by_order(model)
    # OpenVINO may still map an older file of that name into memory, so it is never overwritten in place.
    for old in (Path(xml_path), Path(xml_path).with_suffix(".bin")):
        old.unlink(missing_ok=True)
    openvino.save_model(model, os.fspath(xml_path), compress_to_fp16=fp16)


def _name_by_order(model: Any) -> None:
    """Number the operations that OpenVINO named itself: its numbers depend on what the process did before."""
    for k, operation in enumerate(model.get_ordered_ops()):
        kind = operation.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{kind}_auto{k}")
