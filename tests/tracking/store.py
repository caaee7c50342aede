"""Outputs as stages leave them, and what a store holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distilldsm.config import TrackingConfig
from distilldsm.core.files import read_json, write_json
from distilldsm.tracking import describe, followed
from distilldsm.tracking.publish import Outcome, known_outputs, publish_all

CONFIG = TrackingConfig()
ABSENT = "http://127.0.0.1:9"


def add_epochs(directory: Path, *losses: float) -> None:
    """Write `history.json` as a training does: anew after each epoch."""
    path = directory / "history.json"
    history = read_json(path) if path.is_file() else []
    for loss in losses:
        number = len(history) + 1
        row = {"epoch": number, "train_loss": loss, "val_dice": {"core": loss / 2}, "unix_seconds": 1.7e9 + number}
        write_json(path, [*history, row])
        history.append(row)


@contextmanager
def training(directory: Path, config: TrackingConfig = CONFIG, **said: Any) -> Iterator[Path]:
    """A followed training in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "best.bin").write_bytes(b"weights")
    words = {"name": directory.name, "history": "history.json", "tags": {"fold": 0}, "params": {"a": 1}, **said}
    with followed(config, directory, at_end={"checkpoints": [directory / "best.bin"]}, **words):
        yield directory


def trained(directory: Path, *losses: float, **said: Any) -> Path:
    """A finished training."""
    with training(directory, **said):
        add_epochs(directory, *(losses or (1.0,)))
    return directory


def evaluated(directory: Path, model: Path, **metrics: float) -> Path:
    """A finished evaluation of a training."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "figures").mkdir(exist_ok=True)
    (directory / "figures" / "a.png").write_bytes(b"\x89PNG")
    (directory / "cases.csv").write_text("case,dice,hd95_mm\na,0.9,\nb,,2\n", encoding="utf-8")
    files = {"evaluation/figures": [directory / "figures"]}
    tables = {"evaluation/cases.json": directory / "cases.csv"}
    describe(CONFIG, directory, run_of=model, metrics=metrics, files=files, tables=tables)
    return directory


def publish_known(to: str | None = None) -> list[Outcome]:
    """Publish all known outputs, which must succeed."""
    outcomes = list(publish_all(known_outputs(), to=to))
    assert [one.problems for one in outcomes] == [()] * len(outcomes)
    return outcomes


def the_run(client: Any) -> Any:
    """The only run in the store."""
    runs = all_runs(client)
    assert len(runs) == 1, runs
    return runs[0]


def all_runs(client: Any, condition: str = "") -> list[Any]:
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], condition)
    return sorted(found, key=lambda run: run.info.run_name)


def history(client: Any, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(the_run(client).info.run_id, key)]


def run_of(directory: Path) -> dict[str, Any]:
    return read_json(directory / "tracking.json")["run"]


def onnx_model(directory: Path) -> Path:
    """An exported model: an identity network of any size, with the files that go beside it."""
    onnx = pytest.importorskip("onnx")
    directory.mkdir(parents=True)
    shape = ["batch", 1, "depth", "height", "width"]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("input", "logits")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["input"], ["logits"])], "g", ends[:1], ends[1:])
    network = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(network, directory / "model.onnx")
    (directory / "metadata.json").write_text('{"labels": {"background": 0}}')
    (directory / "model.xml").write_text("<net/>")
    return directory
