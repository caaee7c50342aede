"""Outputs as stages leave them, and what a store holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distilldsm.config import TrackingConfig
from distilldsm.core.files import read_json, write_json
from distilldsm.export.scores import SCORES
from distilldsm.models.package import INTENDED_USE, METADATA
from distilldsm.tracking import describe, followed
from distilldsm.tracking.publish import Outcome, known_outputs, publish_all
from tests.export.test_gate import scored

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


def export_model(directory: Path) -> Path:
    """An exported model, as far as its registration reads it. Its scores are good enough for a champion."""
    directory.mkdir(parents=True)
    image, logits = (
        {"name": name, "shape": (1, count, None, None, None), "multiple_of": (1, 1, 1)}
        for name, count in (("image", 1), ("logits", 2))
    )
    network = {"name": "unet2d", "options": {}, "stride": (1, 1, 1), "depth_halo": 0}
    metadata = {
        "name": "distilldsm-m",
        "intended_use": INTENDED_USE,
        "inputs": [image],
        "outputs": [logits],
        "channels": [{"name": "CT", "modality": "CT", "normalisation": "none"}],
        "labels": {"background": 0, "liver": 1},
        "network": {**network, "parameters": 1, "macs_per_voxel": 1.0},
        "openvino_weights": "FP16",
        "data": dict.fromkeys(("name", "licence", "reference", "source", "note"), ""),
        "fold": 0,
        "checkpoint": "last",
        "files": {},
        "versions": {},
    }
    write_json(directory / METADATA, metadata)
    write_json(directory / SCORES, scored(*[0.9] * 5))
    return directory
