"""Progress as a terminal shows it and as a log gets it; what an interrupt tells."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import sys
import termios
from pathlib import Path

import pytest

from distilldsm.core import progress as module
from distilldsm.core.errors import UserError
from distilldsm.core.interruption import RESUME_VARIABLE, command_again, explains_interrupt
from distilldsm.core.output_directory import output_directory
from distilldsm.core.progress import beside_the_bar, duration, meter, progress
from distilldsm.core.shell import run_shell

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("DISTILLDSM_PROGRESS", RESUME_VARIABLE, "DVC_STAGE", "KFP_RUN_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


class Terminal:
    """A program on a terminal of its own, as a person sees and interrupts it."""

    def __init__(self, *command: str, columns: int = 100, **environment: str) -> None:
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background has it ignored, and children with it
            os.execve(
                sys.executable, [sys.executable, *command], {**os.environ, "PYTHONPATH": str(ROOT), **environment}
            )
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.text = ""

    def read(self, until: str | None = None) -> str:
        """What is shown, up to `until` or to the end."""
        while until is None or until not in self.text:
            try:
                received = os.read(self.screen, 4096)
            except OSError:  # how a terminal ends on Linux
                break
            if not received:
                break
            self.text += received.decode()
        return self.text

    def press_ctrl_c(self) -> None:
        os.write(self.screen, b"\x03")

    def code(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self.screen)
        return os.waitstatus_to_exitcode(status)


LOOP = """
import sys, time
from distilldsm.core.progress import progress
sys.stdin.readline()
for item in progress(range(4), total=4, title="evaluate", unit="case"):
    time.sleep(0.15)
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize(("columns", "width"), [(100, 99), (0, 80)])
def test_a_terminal_gets_one_line_with_rate_time_left_and_memory(columns, width):
    terminal = Terminal("-c", LOOP, columns=columns)
    os.write(terminal.screen, b"\n")
    shown = terminal.read()
    assert terminal.code() == 0
    assert "\x1b" not in shown
    bar, *lines = shown.lstrip("\r\n").split("\n")
    frames = [frame for frame in bar.split("\r") if frame.startswith("evaluate: ") and "%" in frame]
    assert len(frames) >= 3
    assert all(len(frame) <= width for frame in frames)
    assert re.search(r"\d/4 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(case/s|s/case), \d+ MB\]$", frames[-1])
    # Then the line is gone, and one that stays tells the sum.
    assert re.fullmatch(r"evaluate: 4 cases in [\d.]+ s, \d+ MB\r", bar.split("\r", 1)[-1].rpartition(" \r")[2])
    assert lines[0] == "done\r"


def test_a_log_gets_plain_lines(capsys, monkeypatch):
    """As Kubernetes keeps them: whole lines, no carriage return, no colour."""
    monkeypatch.setattr(module, "LOG_EVERY_SECONDS", 0.0)
    clock = iter(range(0, 1000, 90))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    list(progress("abc", total=3, title="validate", unit="case"))
    text = capsys.readouterr().err
    assert "\r" not in text
    assert "\x1b" not in text
    first, second, last = text.splitlines()
    assert re.fullmatch(r"validate: 1/3 cases, 90\.0 s/case, about 3 min left, [\d.]+ [MG]B", first)
    assert re.fullmatch(r"validate: 2/3 cases, 90\.0 s/case, about 90 s left, [\d.]+ [MG]B", second)
    assert re.fullmatch(r"validate: 3 cases in 360\.0 s, [\d.]+ [MG]B", last)


def test_lines_are_rare_and_short_loops_of_many_silent(capsys, monkeypatch):
    list(progress("abc", total=3, title="a", unit="case"))
    assert len(capsys.readouterr().err.splitlines()) == 1
    list(progress("abc", total=3, title="a", unit="case", brief=True))
    list(progress("", total=0, title="a", unit="case"))
    with meter(total=3, title="peer", unit="step", shown=False) as counted:
        counted.advance(2)
    assert counted.done == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        list(progress((1 / k for k in (1, 0)), total=2, title="a", unit="case"))
    assert capsys.readouterr().err == "", "what failed did not end"


def test_a_total_that_nobody_knows_and_bytes(capsys, monkeypatch):
    monkeypatch.setattr(module, "LOG_EVERY_SECONDS", 0.0)
    with meter(total=None, title="INT8", unit="volume") as shown:
        shown.advance()
    assert "INT8: 1 volumes, " in (text := capsys.readouterr().err)
    assert "left" not in text
    with meter(total=3_000_000, initial=1_000_000, title="a.tar", unit="B") as shown:
        shown.advance(1_000_000, note="mirror")
    first, last = capsys.readouterr().err.splitlines()
    assert re.match(r"a\.tar: 2\.0 of 3\.0 MB \(67%\), [\d,.]+ MB/s, about 0 s left, mirror, ", first)
    assert last.startswith("a.tar: 2.0 MB in ")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "on_a_terminal", "in_a_log"),
    [
        ({}, "bar", "plain"),
        ({"NO_COLOR": "1"}, "bar", "plain"),
        ({"TERM": "dumb"}, "plain", "plain"),
        ({"DISTILLDSM_PROGRESS": "plain"}, "plain", "plain"),
        ({"DISTILLDSM_PROGRESS": "bar"}, "bar", "bar"),
        ({"DISTILLDSM_PROGRESS": "off"}, "off", "off"),
        ({"DISTILLDSM_PROGRESS": "colourful"}, "bar", "plain"),
    ],
)
def test_how_it_is_shown(environment, on_a_terminal, in_a_log, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert module.mode(Screen()) == on_a_terminal
    assert module.mode(io.StringIO()) == in_a_log
    screen = Screen()
    list(progress("abc", total=3, title="a", unit="case", file=screen))
    assert ("\r" in screen.getvalue(), bool(screen.getvalue())) == (on_a_terminal == "bar", on_a_terminal != "off")
    assert "\x1b" not in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (7260, "2 h 01 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words.replace("100 min", "1 h 40 min")


def test_an_error_and_what_is_printed_have_lines_of_their_own(capsys, monkeypatch):
    monkeypatch.setenv("DISTILLDSM_PROGRESS", "bar")

    def command() -> None:
        for item in progress("abc", total=3, title="a", unit="case"):
            with beside_the_bar():
                print(f"printed {item}")
            if item == "b":
                raise UserError("it is broken")

    assert run_shell(command) == 1
    captured = capsys.readouterr()
    assert captured.out == "printed a\nprinted b\n"
    assert re.search(r"\r +\rerror: it is broken\n$", captured.err)
    assert not module._open_bars


INTERRUPTED = """
import sys, time
from pathlib import Path
from distilldsm.core.progress import progress
from distilldsm.core.shell import run_shell
from distilldsm.core.output_directory import output_directory
from distilldsm.core.workers import worker_pool

def work(path):
    path.with_suffix(".begun").touch()
    time.sleep(0.4)
    path.touch()

def stage():
    kept = lambda folder: f"{len(list(folder.glob('*.done')))} of 40 cases are kept"
    with output_directory("out", stage="preprocess", config={}, inputs={}, resumable=True, kept=kept) as folder:
        with worker_pool(2, setting="workers") as pool:
            futures = [pool.submit(work, folder / f"{k}.done") for k in range(40)]
            for future in progress(futures, total=40, title="preprocess", unit="case"):
                future.result()

if __name__ == "__main__":
    sys.exit(run_shell(stage))
"""


def test_ctrl_c_on_a_terminal_ends_all_processes_and_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(INTERRUPTED)
    terminal = Terminal("script.py", "--fold", "2", columns=120)
    terminal.read(until=" 1/40 ")
    terminal.press_ctrl_c()
    shown = terminal.read()
    assert terminal.code() == 130
    assert "Traceback" not in shown, "workers get the same Ctrl-C"
    done, begun = (len(list((tmp_path / ".out.partial").glob(f"*.{kind}"))) for kind in ("done", "begun"))
    assert 1 <= done == begun < 40, "what was begun is finished, nothing else is begun"
    told = shown.rpartition("\r \r")[2].splitlines()[-3:]
    assert told[0].rpartition("\r")[2] == "interrupted"
    assert told[1] == f"  preprocess: {done} of 40 cases are kept"
    assert told[2].startswith("  continue with: python")
    assert told[2].endswith(" script.py --fold 2")


@pytest.mark.slow
def test_dvc_passes_the_terminal_and_ctrl_c_through(tmp_path, monkeypatch):
    pytest.importorskip("dvc")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(INTERRUPTED)
    (tmp_path / "dvc.yaml").write_text(f"stages: {{preprocess: {{cmd: '{sys.executable} script.py', outs: [out]}}}}")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    terminal = Terminal("-m", "dvc", "repro", columns=120)
    terminal.read(until=" 1/40 ")
    terminal.press_ctrl_c()
    shown = terminal.read()
    assert terminal.code() != 0
    assert "Traceback" not in shown
    assert re.search(r"preprocess: +\d+%\|.*/40 \[.*case.*, \d+ MB\]", shown), "DVC's stages have the terminal"
    assert re.search(r"interrupted\r\n  preprocess: \d+ of 40 cases are kept\r\n  continue with: dvc repro\r\n", shown)
    assert list((tmp_path / ".out.partial").glob("*.done")), "DVC leaves the unfinished output alone"


def test_the_command_that_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/distilldsm", "evaluate", "--set", "a b=1"])
    assert command_again() == "distilldsm evaluate --set 'a b=1'"
    monkeypatch.setattr(sys, "argv", ["/repo/distilldsm/components/train.py", "--fold", "1"])
    monkeypatch.setattr(sys, "orig_argv", ["/opt/venv/bin/python3", "-m", "distilldsm.components.train", "--fold", "1"])
    assert command_again() == "python3 -m distilldsm.components.train --fold 1"
    for name, words in (
        ("TORCHELASTIC_RUN_ID", "the same torchrun command"),
        ("KFP_RUN_ID", "the same step"),
        ("DVC_STAGE", "dvc repro"),
        (RESUME_VARIABLE, "distilldsm cross-validate"),
    ):
        monkeypatch.setenv(name, "distilldsm cross-validate")
        assert command_again().startswith(words)


def interrupted(**options) -> list[str]:
    with pytest.raises(KeyboardInterrupt) as caught:
        with output_directory("out", stage="export", config={}, inputs={}, **options):
            raise KeyboardInterrupt
    return caught.value.__notes__


def test_what_an_interrupted_output_tells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert interrupted() == ["export: out is as it was before"]
    assert interrupted(resumable=True) == ["export: what is done is kept"]
    assert interrupted(resumable=True, kept=lambda work: f"{work.name}: 3") == ["export: .out.partial: 3"]
    assert interrupted(resumable=True, kept=lambda work: (work / "gone").read_text()) == [
        "export: what is done is kept"
    ]


def test_a_second_interrupt_loses_no_note_and_no_secret_is_told(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distilldsm", "train", "--set", "x=https://anna:geheim99@host/a"])

    def command() -> None:
        try:
            with explains_interrupt(lambda: "train: 2 of 4 epochs are kept"):
                raise KeyboardInterrupt
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while the tracking is being closed

    assert run_shell(command) == 130
    text = capsys.readouterr().err
    assert text == (
        "interrupted\n  train: 2 of 4 epochs are kept\n  continue with: distilldsm train --set x=https://host/a\n"
    )
    assert run_shell(lambda: (_ for _ in ()).throw(KeyboardInterrupt())) == 130
    assert "  continue with: distilldsm train" in capsys.readouterr().err


def test_a_note_that_fails_does_not_stop_the_interrupt():
    with pytest.raises(KeyboardInterrupt), explains_interrupt(lambda: str(1 / 0)):
        raise KeyboardInterrupt
