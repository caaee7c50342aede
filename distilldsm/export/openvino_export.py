"""Convert ONNX to OpenVINO IR."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from distilldsm.inference.engines import openvino_core, unloadable


def export_openvino(onnx_path: str | os.PathLike[str], xml_path: str | os.PathLike[str], *, fp16: bool) -> None:
    """Write an ONNX model as OpenVINO IR (`.xml` and `.bin`). Free sizes stay free.

    Args:
        onnx_path: the file from `export_onnx`.
        xml_path: the `.xml` to write; the `.bin` lies beside it.
        fp16: store the weights in half precision (half the size). The runtime still chooses its own precision.

    Raises:
        DataError: OpenVINO cannot read the model.
    """
    import openvino

    # read_model has the same ONNX frontend as convert_model, but no telemetry.
    try:
        model = openvino_core().read_model(os.fspath(onnx_path))
    except RuntimeError as error:
        raise unloadable("OpenVINO", onnx_path, error) from None
    _name_by_order(model)
    # OpenVINO may still map an older file of this name into memory. So the file is never overwritten in place.
    for old in (Path(xml_path), Path(xml_path).with_suffix(".bin")):
        old.unlink(missing_ok=True)
    openvino.save_model(model, os.fspath(xml_path), compress_to_fp16=fp16)


def _name_by_order(model: Any) -> None:
    """Rename the operations that OpenVINO numbered: its numbers depend on what the process did before."""
    for k, operation in enumerate(model.get_ordered_ops()):
        kind = operation.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{kind}_auto{k}")
