"""The journal: torn writes, spooling, what counts as pending and when a segment goes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.tracking import journal
from distilldsm.tracking.journal import JournalWriter, State, pending, read_entries, segments

names = st.text(max_size=8)
values = st.dictionaries(names, st.one_of(st.integers(), st.text(max_size=20), st.none(), st.booleans()), max_size=3)


def records(directory: Path) -> list[dict]:
    return [entry.record for segment in segments(directory) for entry in read_entries(segment)]


@settings(deadline=None, max_examples=40)
@given(written=st.lists(values, min_size=1, max_size=6), data=st.data())
def test_a_torn_tail_is_left_out_and_everything_before_it_is_read(tmp_path_factory, written, data):
    directory = tmp_path_factory.mktemp("j")
    writer = JournalWriter(directory)
    for value in written:
        writer.append("tags", values=value)
    path = directory / writer.segment
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    read = list(read_entries(path))
    complete = whole[:cut].count(b"\n")
    assert [entry.record["values"] for entry in read] == written[:complete]
    assert (read[-1].end if read else 0) == len(whole[: whole.rfind(b"\n", 0, cut) + 1])


@settings(deadline=None, max_examples=40)
@given(garbage=st.binary(max_size=30))
def test_garbage_in_the_middle_costs_only_itself(tmp_path_factory, garbage):
    directory = tmp_path_factory.mktemp("j")
    writer = JournalWriter(directory)
    writer.append("tags", values={"a": 1})
    with open(directory / writer.segment, "ab") as stream:
        stream.write(garbage.replace(b"\n", b"") + b"\n")
    writer.append("tags", values={"b": 2})
    good = [e.record["values"] for e in read_entries(directory / writer.segment) if e.record is not None]
    assert good == [{"a": 1}, {"b": 2}]


def test_reading_goes_on_where_it_stopped(tmp_path):
    writer = JournalWriter(tmp_path)
    for number in range(5):
        writer.append("tags", values={"n": number})
    entries = list(read_entries(tmp_path / writer.segment))
    rest = read_entries(tmp_path / writer.segment, entries[1].end)
    assert [e.record["values"]["n"] for e in rest] == [2, 3, 4]


def test_a_failed_write_does_not_spoil_the_next_record(tmp_path, monkeypatch):
    writer = JournalWriter(tmp_path)
    writer.append("tags", values={"n": 1})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", lambda file, data: write(file, data[:7]))
        with pytest.raises(OSError, match="only part"):
            writer.append("tags", values={"n": 2})
    with monkeypatch.context() as patch:

        def full(file, data):
            raise OSError(28, "No space left on device")

        patch.setattr(journal.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.append("tags", values={"n": 3})
    writer.append("tags", values={"n": 4})
    assert [r and r["values"]["n"] for r in records(tmp_path)] == [1, None, 4]


def test_threads_do_not_mix_their_lines(tmp_path):
    writer = JournalWriter(tmp_path)

    def work(thread: int) -> None:
        for number in range(200):
            writer.append("tags", values={"t": thread, "n": number, "long": "x" * 500})

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = records(tmp_path)
    for thread_number in range(4):
        numbers = [r["values"]["n"] for r in found if r["values"]["t"] == thread_number]
        assert numbers == list(range(200))


def test_segments_of_one_process_are_in_the_order_of_their_making(tmp_path):
    writers = [JournalWriter(tmp_path) for _ in range(20)]
    assert [path.name for path in segments(tmp_path)] == [writer.segment for writer in writers]


def test_spooled_files_do_not_follow_their_originals(tmp_path):
    writer = JournalWriter(tmp_path / "j")
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "sub" / "a.txt").write_text("before")
    copy, relative = writer.spool(tmp_path / "d")
    (tmp_path / "d" / "sub" / "a.txt").write_text("after")
    single, _ = writer.spool(tmp_path / "d" / "sub" / "a.txt")
    assert (copy / "sub" / "a.txt").read_text() == "before"
    assert tmp_path / "j" / relative == copy
    assert single.read_text() == "after"
    assert single.name == "a.txt"


def test_a_spooling_that_fails_leaves_nothing(tmp_path):
    writer = JournalWriter(tmp_path / "j")
    with pytest.raises(FileNotFoundError):
        writer.spool(tmp_path / "missing")
    assert not list((tmp_path / "j" / "spool").iterdir())


@pytest.mark.parametrize("value", [0.1, -3, math.inf, -math.inf, math.nan, 1e308])
def test_numbers_survive_strict_json(value):
    text = json.dumps(journal.encode_number(value), allow_nan=False)
    back = float(json.loads(text))
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_state_is_kept_and_a_broken_one_is_as_none(tmp_path):
    state = State(tracking_uri="http://a", run_id="r", acknowledged={"s": 3}, rejected=1, last_error="e")
    state.save(tmp_path)
    assert State.load(tmp_path) == state
    for text in ("", "{", "[]", '{"run_id": 1}'):
        (tmp_path / "state.json").write_text(text)
        assert State.load(tmp_path) == State()


def test_pending_counts_what_is_not_acknowledged(tmp_path):
    writer = JournalWriter(tmp_path)
    writer.append("open", pid=1)
    for number in range(3):
        writer.append("tags", values={"n": number})
    writer.close()
    assert pending(tmp_path) == 3
    second = list(read_entries(tmp_path / writer.segment))[1]
    State(acknowledged={writer.segment: second.end}).save(tmp_path)
    assert pending(tmp_path) == 2


def _delivered(directory: Path) -> State:
    return State(acknowledged={s.name: s.stat().st_size for s in segments(directory)})


def test_a_delivered_segment_goes_when_its_writer_is_done(tmp_path):
    writer = JournalWriter(tmp_path)
    writer.append("open", **journal.writer_identity())
    path = tmp_path / writer.segment
    journal.remove_if_delivered(path, _delivered(tmp_path))
    assert path.exists(), "its writer may go on"
    before = _delivered(tmp_path)
    writer.close()
    journal.remove_if_delivered(path, before)
    assert path.exists(), "the last line is not delivered"
    state = _delivered(tmp_path)
    journal.remove_if_delivered(path, state)
    assert not path.exists()
    assert state.acknowledged == {}


def test_a_delivered_segment_goes_when_its_writer_is_dead_and_not_watched(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    writer = JournalWriter(tmp_path)
    writer.append("open", **{**journal.writer_identity(), "pid": gone.pid})
    path = tmp_path / writer.segment
    journal.remove_if_delivered(path, _delivered(tmp_path), watched=gone.pid)
    assert path.exists()
    journal.remove_if_delivered(path, _delivered(tmp_path))
    assert not path.exists()


def test_a_writer_on_another_machine_counts_as_alive(tmp_path):
    writer = JournalWriter(tmp_path)
    writer.append("open", pid=2**22 + 1, host="elsewhere")
    journal.remove_if_delivered(tmp_path / writer.segment, _delivered(tmp_path))
    assert (tmp_path / writer.segment).exists()


def test_one_process_delivers_at_a_time(tmp_path):
    with journal.delivery_lock(tmp_path) as first, journal.delivery_lock(tmp_path) as second:
        assert (first, second) == (True, False)
    with journal.delivery_lock(tmp_path) as third:
        assert third


def test_head_is_the_first_open_record(tmp_path):
    assert journal.head(tmp_path) is None
    writer = JournalWriter(tmp_path)
    writer.append("open", run_key="a")
    JournalWriter(tmp_path).append("open", run_key="b")
    assert journal.head(tmp_path)["run_key"] == "a"
