"""Saves an exported model directory as an MLflow model for arrays and scans, without pickle and torch.

The model's code is `scan_model.py` (MLflow calls this "models from code").
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import distilldsm
from distilldsm.models.package import TensorInfo, load_metadata

PACKAGES = ("numpy", "scipy", "nibabel", "PyYAML", "filelock", "tqdm", "openvino")
"""Packages that prediction imports."""


def requirements() -> list[str]:
    """The packages that serving an exported model needs, pinned to the versions installed here."""
    return ["mlflow" + _pin("mlflow", "mlflow-skinny"), *(name + _pin(name) for name in PACKAGES)]


def _pin(*names: str) -> str:
    for name in names:
        try:
            return f"=={importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def save(model_dir: Path, path: Path, mlflow_model: Any, *, pip_requirements: list[str], metadata: Any) -> None:
    """Write the MLflow model: MLflow's own files and a copy of `model_dir`. The result is also a model directory.

    Args:
        path: new directory.
        mlflow_model: an `mlflow.models.Model` with the ids of the run and of the logged model.
        metadata: added to the MLflow model's description.

    Raises:
        DataError: the directory holds no exported model, or its metadata are damaged.
    """
    from mlflow.pyfunc import save_model

    save_model(
        str(path),
        python_model=str(Path(__file__).with_name("scan_model.py")),
        code_paths=[str(Path(distilldsm.__file__).parent)],
        mlflow_model=mlflow_model,
        signature=scan_signature(model_dir),
        pip_requirements=pip_requirements,
        metadata=metadata,
    )
    for file in sorted(model_dir.iterdir()):
        target = path / file.name
        if file.is_dir():
            shutil.copytree(file, target, dirs_exist_ok=True)
        elif not target.exists():
            shutil.copyfile(file, target)


def scan_signature(model_dir: Path) -> Any:
    """The signature: tensors `image` and `logits` of any size, and the parameters `paths` and `output` for scans.

    An MLflow schema holds either tensors or columns, not both. Paths are parameters, and MLflow and KServe can still
    check the arrays. (MLflow also accepts an array of objects: from Python, `image` may hold paths.)
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
