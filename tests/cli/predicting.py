"""What tests of `distilldsm predict` share: scans, a model of one channel, the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from distilldsm.cli.main import main
from distilldsm.core.files import read_json, sha256_file, write_json
from tests.data.volumes import affine, ellipsoid


def write_scan(folder: Path, names: tuple[str, ...], *, shape=(23, 31, 9), seed: int = 0) -> list[Path]:
    """Two channels: LPS, oblique by a few degrees, anisotropic, not the size of any training case."""
    rng = np.random.default_rng(seed)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    matrix = turn @ affine("LPS", (0.8, 0.9, 3.0))
    bright = ellipsoid(shape, np.array(shape) / 2, np.array(shape) / 3)
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for channel, name in enumerate(names):
        data = (100 + 60 * (1 + channel) * bright + rng.normal(0, 10, shape)).astype(np.float32)
        paths.append(folder / name)
        nib.save(nib.Nifti1Image(data, matrix), paths[-1])
    return paths


def single_channel(export: Path, root: Path) -> Path:
    """The exported model made one of a single channel: its first convolution sees the channel twice."""
    import onnx
    from onnx import helper

    from distilldsm.export.openvino_export import export_openvino

    shutil.copytree(export, root)
    model = onnx.load(root / "model.onnx")
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            if name == "image":
                node.input[k] = "both"
    model.graph.node.insert(0, helper.make_node("Concat", ["image", "image"], ["both"], axis=1))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save_model(model, root / "model.onnx")
    export_openvino(root / "model.onnx", root / "model.xml", fp16=False)
    plan = read_json(root / "plan.json")
    plan["channels"], plan["normalisation"] = plan["channels"][:1], plan["normalisation"][:1]
    write_json(root / "plan.json", plan)
    (root / "manifest.json").unlink()
    metadata = read_json(root / "metadata.json")
    metadata["channels"] = metadata["channels"][:1]
    metadata["inputs"][0]["shape"][1] = 1
    metadata["files"] = {name: sha256_file(root / name) for name in metadata["files"]}
    write_json(root / "metadata.json", metadata)
    return root


def predict(model: Path, scans, out: Path, *options: str) -> int:
    return main(["predict", str(model), *map(str, scans), "-o", str(out), *options])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
