"""An exported model directory as an MLflow model.

A whole one becomes code that takes arrays and scans (`scan_model.py`, models from code: no pickle, no torch). One that
holds an ONNX file only gets MLflow's ONNX flavour: arrays alone.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import distilldsm
from distilldsm.models.package import METADATA, RUNTIME_FILES, TensorInfo, load_metadata

PACKAGES = ("numpy", "scipy", "nibabel", "PyYAML", "filelock", "tqdm", "openvino")
"""What prediction imports: this package's own dependencies."""
ONNX_PACKAGES = ("numpy", "onnx", "onnxruntime")


def is_package(model_dir: Path) -> bool:
    """Whether a directory holds all that prediction from scans needs."""
    return all((model_dir / name).is_file() for name in (METADATA, *RUNTIME_FILES["openvino"]))


def requirements(model_dir: Path) -> list[str]:
    """What serving the model needs, pinned to what is installed here."""
    names = PACKAGES if is_package(model_dir) else ONNX_PACKAGES
    return ["mlflow" + _pin("mlflow", "mlflow-skinny"), *(name + _pin(name) for name in names)]


def _pin(*names: str) -> str:
    for name in names:
        try:
            return f"=={importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def save(model_dir: Path, path: Path, mlflow_model: Any, *, pip_requirements: list[str], metadata: Any) -> None:
    """Write the MLflow model: its own files and all of `model_dir`, so that it is a model directory again.

    Args:
        path: new directory.
        mlflow_model: an `mlflow.models.Model` that says whose it is.
        metadata: goes into the model's description.

    Raises:
        ImportError: onnx is needed for this directory and not installed.
        DataError: the directory's metadata are damaged.
    """
    with tempfile.TemporaryDirectory(prefix="distilldsm-") as folder:
        if is_package(model_dir):
            _save_scan_model(model_dir, path, Path(folder), mlflow_model, pip_requirements, metadata)
        else:
            _save_onnx(model_dir, path, mlflow_model, pip_requirements, metadata)
    split = any(file.name.startswith("model.onnx.") for file in model_dir.iterdir()) and not is_package(model_dir)
    for file in sorted(model_dir.iterdir()):
        if split and file.name.startswith("model.onnx"):
            continue  # the flavour has written it in one piece
        target = path / file.name
        if file.is_dir():
            shutil.copytree(file, target, dirs_exist_ok=True)
        elif file.name == "model.onnx" or not target.exists():
            shutil.copyfile(file, target)  # byte for byte, for the metadata hold the hashes


def _save_scan_model(
    model_dir: Path, path: Path, scratch: Path, mlflow_model: Any, pip_requirements: list[str], metadata: Any
) -> None:
    from mlflow.pyfunc import save_model

    package = Path(distilldsm.__file__).parent
    code = scratch / package.name
    shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    save_model(
        str(path),
        python_model=str(Path(__file__).with_name("scan_model.py")),
        code_paths=[str(code)],
        mlflow_model=mlflow_model,
        signature=scan_signature(model_dir),
        pip_requirements=pip_requirements,
        metadata=metadata,
    )


def scan_signature(model_dir: Path) -> Any:
    """`image` to `logits` of any size, as the metadata describe them; parameters `paths` and `output` for scans.

    MLflow's schemas know either tensors or columns, not both: paths come as parameters, so that arrays keep a signature
    that MLflow and KServe check. (MLflow also lets an array of objects pass, so that from Python paths may be `image`.)
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    described = load_metadata(model_dir)

    def specs(tensors: tuple[TensorInfo, ...]) -> Any:
        return Schema(
            [TensorSpec(np.dtype(t.dtype), [-1 if size is None else size for size in t.shape], t.name) for t in tensors]
        )

    params = ParamSchema(
        [ParamSpec("paths", DataType.string, [], shape=(-1,)), ParamSpec("output", DataType.string, "")]
    )
    return ModelSignature(inputs=specs(described.inputs), outputs=specs(described.outputs), params=params)


def _save_onnx(
    model_dir: Path, path: Path, mlflow_model: Any, pip_requirements: list[str], metadata: Mapping[str, Any]
) -> None:
    import onnx
    from mlflow.onnx import save_model

    network = onnx.load(str(model_dir / "model.onnx"))
    save_model(
        network,
        str(path),
        mlflow_model=mlflow_model,
        signature=_graph_signature(network),
        pip_requirements=pip_requirements,
        metadata=metadata,
        save_as_external_data=False,
    )


def _graph_signature(network: Any) -> Any:
    """The signature of an ONNX network, from its graph: dynamic dimensions become -1."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec
    from onnx.helper import tensor_dtype_to_np_dtype

    def specs(values: Any) -> Any:
        return Schema(
            [
                TensorSpec(
                    tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
                    [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim],
                    name=value.name,
                )
                for value in values
            ]
        )

    weights = {tensor.name for tensor in network.graph.initializer}
    inputs = [value for value in network.graph.input if value.name not in weights]
    return ModelSignature(inputs=specs(inputs), outputs=specs(network.graph.output))
