"""The short form of `python -m benchmarks.faults`: a few faults at random moments, on a tiny pipeline."""

from __future__ import annotations

import random
import time

import pytest

from benchmarks.faults import kills, storage, twice
from benchmarks.faults.report import Row, markdown
from benchmarks.faults.workspace import OUTPUTS, Workspace, broken, differences

pytestmark = pytest.mark.slow
STAGES = ("download", "validate", "preprocess", "train", "evaluate")


@pytest.fixture(scope="module")
def rng() -> random.Random:
    """Other moments each time; a failure tells them."""
    seed = int(time.time())
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, float]]:
    place = Workspace(tmp_path_factory.mktemp("faults") / "reference")
    return place, place.run_all(STAGES)


def nothing_lost(*rows: Row) -> None:
    assert not [row for row in rows if row.lost], markdown(rows)
    assert all(row.tried for row in rows)


def test_killed_and_started_again(undisturbed, tmp_path, rng):
    reference, seconds = undisturbed
    nothing_lost(*kills.stage_kills(reference, seconds, tmp_path, kills=1, rng=rng, stages=("train",)))


def test_a_worker_is_killed(undisturbed, tmp_path, rng):
    nothing_lost(*storage.worker_killed(undisturbed[0], tmp_path, times=1, rng=rng, stages=("evaluate",)))


def test_the_disk_is_full(undisturbed, tmp_path):
    if not storage.can_mount():
        pytest.skip("a small file system can be mounted by root only")
    nothing_lost(*storage.disk_full(undisturbed[0], tmp_path, shares=(0.5,), stages=("train",)))


def test_two_at_once(undisturbed, tmp_path):
    nothing_lost(twice.stages_twice(undisturbed[0], tmp_path, stages=("preprocess",)))


def test_the_harness_sees_damage(undisturbed, tmp_path):
    reference, _ = undisturbed
    place = Workspace(tmp_path / "damaged")
    place.copy_of(reference, "evaluate")
    weights = place.output("train") / "last.safetensors"
    assert broken(place.output("train")) is None
    assert differences(place.output("train"), reference.output("train")) == []
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "last.safetensors" in (broken(place.output("train")) or "")
    assert differences(place.output("train"), reference.output("train")) == ["last.safetensors"]
    (place.output("train") / "manifest.json").unlink()
    assert "without a manifest" in (broken(place.output("train")) or "")
    assert broken(place.output("export")) is None
    assert list(OUTPUTS)[-1] == "export"


def test_mlflow_is_asked_for_every_epoch_once(undisturbed):
    assert kills.wrong_in_mlflow(undisturbed[0].folder, epochs=3) is None
    assert "epochs" in (kills.wrong_in_mlflow(undisturbed[0].folder, epochs=4, patience_s=0) or "")
