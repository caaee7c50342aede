"""Running checks: in order, in time, and whatever they do."""

from __future__ import annotations

import threading

import pytest

from distilldsm.core.errors import UserError
from distilldsm.doctor.checks import Check, Finding, clean, in_child, run_checks


def check(name: str, run) -> Check:
    return Check(name=name, about="", run=run)


def raising(error: BaseException):
    def run(limit_s: float) -> list[Finding]:
        raise error

    return run


def test_findings_come_in_order_and_no_check_brings_down_another():
    fine = Finding(name="fine", status="ok", seen="well")
    told = UserError("is wrong", where="http://anna:geheim99@host/x", seen=3, rule="2 at most", hint="take less")
    findings = run_checks(
        [
            check("hangs", lambda limit_s: threading.Event().wait(30)),
            check("crashes", raising(ZeroDivisionError("by zero"))),
            check("exits", raising(SystemExit(3))),
            check("told", raising(told)),
            check("says nothing", lambda limit_s: []),
            check("fine", lambda limit_s: [fine, fine]),
        ],
        limit_s=0.3,
    )
    assert [one.name for one in findings] == ["hangs", "crashes", "exits", "told", "says nothing", "fine", "fine"]
    assert [one.status for one in findings] == ["fail"] * 5 + ["ok"] * 2
    assert findings[0].seen == "no answer within 0.3 s"
    assert findings[1].seen == "the check broke: ZeroDivisionError: by zero"
    assert findings[2].seen == "the check broke: SystemExit: 3"
    assert (findings[3].seen, findings[3].hint) == ("http://host/x: is wrong; seen: 3; 2 at most", "take less")


def test_texts_of_others_are_one_line_without_secrets(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "geheim99")
    assert clean("at https://anna:x@host\n\n  with geheim99") == "at https://host with ***"
    assert clean("a" * 500, 10) == "a" * 10 + " ..."


@pytest.mark.parametrize(
    ("function", "status", "seen"),
    [
        ("tests.doctor.children:fine", "warn", "carried, 0.5 s"),
        ("tests.doctor.children:hangs", "fail", "no answer within 0.5 s"),
        (
            "tests.doctor.children:dies",
            "fail",
            "the check's process ended with exit code 7; its last line: about to crash at https://host/x",
        ),
        ("tests.doctor.children:breaks", "fail", "the check broke: SystemExit: a library ends the process"),
        ("mlflow_that_is_not_there:check", "fail", "the package 'mlflow_that_is_not_there' is not installed"),
    ],
)
def test_a_check_in_a_process_of_its_own(function, status, seen):
    (found,) = in_child("x", function, 0.5, {"PLANTED": "carried"})
    assert (found.status, found.seen) == (status, seen)


def test_a_process_that_does_not_even_start_up_is_ended(monkeypatch):
    monkeypatch.setattr("distilldsm.doctor.checks.LOADING_S", -0.4)
    (found,) = in_child("x", "tests.doctor.children:hangs", 0.5)
    assert found.seen == "no answer within 0.5 s"
