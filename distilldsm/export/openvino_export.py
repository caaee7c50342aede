"""ONNX to OpenVINO IR."""

from __future__ import annotations

import os
from pathlib import Path

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
    # OpenVINO may still map an older file of that name into memory, so it is never overwritten in place.
    for old in (Path(xml_path), Path(xml_path).with_suffix(".bin")):
        old.unlink(missing_ok=True)
    openvino.save_model(model, os.fspath(xml_path), compress_to_fp16=fp16)
