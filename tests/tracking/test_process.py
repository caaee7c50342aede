"""The first attempt to send is listened to: what it said is told at once, once, and only if it failed."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from distilldsm.tracking import process
from distilldsm.tracking.journal import State


def listening(directory: Path, *, ended: bool = False) -> tuple[threading.Event, list[str], threading.Thread]:
    """What ends the waiting, what was told, and the thread that waits."""
    told: list[str] = []
    before = set(threading.enumerate())
    worker = SimpleNamespace(poll=lambda: 1 if ended else None)
    enough = process.report_first_attempt(directory, worker, told.append)
    [thread] = set(threading.enumerate()) - before
    return enough, told, thread


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(process, "_GLANCE_S", 0.01)


def test_a_failure_is_told_once(tmp_path):
    State(last_error="of an earlier run").save(tmp_path)
    _, told, thread = listening(tmp_path)
    thread.join(0.1)
    assert thread.is_alive(), "that error is an old one"
    State(last_error="does not let user 'x' in").save(tmp_path)
    thread.join(30)
    State(last_error="again").save(tmp_path)
    assert told == ["does not let user 'x' in"]


def test_success_is_not_told(tmp_path):
    _, told, thread = listening(tmp_path)
    State(run_id="r").save(tmp_path)
    thread.join(30)
    assert not thread.is_alive()
    assert told == []


def test_the_waiting_ends_with_the_run_and_with_the_worker(tmp_path):
    enough, told, thread = listening(tmp_path)
    enough.set()
    thread.join(30)
    assert not thread.is_alive()
    *_, gone = listening(tmp_path, ended=True)
    gone.join(30)
    assert not gone.is_alive()
    assert told == []
