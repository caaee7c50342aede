"""What a store and a directory hold of a run, and a model to register."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def the_run(client: Any) -> Any:
    """The only run in the store."""
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 1, runs
    return runs[0]


def history(client: Any, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(the_run(client).info.run_id, key)]


def run_file(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "mlflow_run.json").read_text())


def journal_text(place: Path) -> str:
    return "".join(path.read_text() for path in place.glob("tracking/*/*.json*"))


def onnx_model(directory: Path) -> Path:
    """An exported model: an identity network of any size, with the files that go beside it."""
    onnx = pytest.importorskip("onnx")
    directory.mkdir()
    shape = ["batch", 1, "depth", "height", "width"]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("input", "logits")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["input"], ["logits"])], "g", ends[:1], ends[1:])
    network = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(network, directory / "model.onnx")
    (directory / "metadata.json").write_text('{"labels": {"background": 0}}')
    (directory / "model.xml").write_text("<net/>")
    return directory
