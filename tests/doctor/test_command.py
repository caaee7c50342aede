"""`distilldsm doctor` as a shell sees it, and what the user has set."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distilldsm.cli import doctor
from distilldsm.cli.main import main
from distilldsm.core.version import __version__
from distilldsm.doctor import report, settings
from distilldsm.doctor.checks import Finding
from tests.doctor.conftest import contents

ROOT = Path(__file__).resolve().parents[2]
FINDINGS = [
    Finding(name="python", status="ok", seen="3.11", hint="is not told"),
    Finding(name="mlflow outputs", status="warn", seen="4 records wait " * 9, hint="send them"),
    Finding(name="mlflow", status="fail", seen="away", hint="start it"),
    Finding(name="gpu", status="skip", seen="none"),
]


def test_aligned_lines_with_the_mend_under_what_is_not_ok():
    assert report.render(FINDINGS, 1.26, colour=False, width=80).splitlines() == [
        "ok    python          3.11",
        "warn  mlflow outputs  4 records wait 4 records wait 4 records wait 4 records",
        "                      wait 4 records wait 4 records wait 4 records wait 4",
        "                      records wait 4 records wait",
        "                      hint: send them",
        "fail  mlflow          away",
        "                      hint: start it",
        "skip  gpu             none",
        "",
        "1 ok, 1 warnings, 1 failed, 1 skipped (1.3 s)",
    ]


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    class Screen:
        def __init__(self, terminal: bool) -> None:
            self.isatty = lambda: terminal

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert report.wants_colour(Screen(True))
    assert not report.wants_colour(Screen(False))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not report.wants_colour(Screen(True))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not report.wants_colour(Screen(True))
    coloured = report.render(FINDINGS, 1.26, colour=True, width=80)
    assert "\x1b[31mfail\x1b[0m  mlflow " in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == report.render(FINDINGS, 1.26, colour=False, width=80)


def test_params(place):
    (found,) = settings.check_params(1)
    assert found.status == "warn"
    assert "distilldsm compose" in found.hint
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    (found,) = settings.check_params(1)
    assert found.status == "ok"
    assert main(["doctor", "params", "environment"]) == 0
    Path("params.yaml").write_text("train: {epoch: 3}")
    assert main(["doctor", "params"]) == 1


def test_variables_that_have_no_effect(place, monkeypatch):
    assert settings.check_environment(1)[0].status == "ok"
    monkeypatch.setenv("DISTILLDSM_DEBUG", "secret")
    (found,) = settings.check_environment(1)
    assert (found.status, found.seen) == ("ok", "DISTILLDSM_DEBUG")
    monkeypatch.setenv("DISTILLDSM_DOWNLOAD_PASWORD", "geheim99")
    monkeypatch.setenv("DISTILLDSM_NONSENSE", "1")
    monkeypatch.setenv("DISTILLDSM_PROGRESS", "colourful")
    monkeypatch.setenv("DISTILLDSM_SCANS", "/not/there")
    found = {one.seen: one.hint for one in settings.check_environment(1)}
    assert found["DISTILLDSM_DOWNLOAD_PASWORD has no effect"] == "did you mean 'DISTILLDSM_DOWNLOAD_PASSWORD'?"
    assert found["DISTILLDSM_NONSENSE has no effect"].startswith("known are DISTILLDSM_BUILDER, DISTILLDSM_DEBUG, ")
    assert found["DISTILLDSM_PROGRESS has an unknown value"] == "set it to bar, plain, off"
    assert "DISTILLDSM_SCANS: no such folder" in found
    assert "geheim" not in str(found)


def test_every_variable_that_the_sources_read_is_known():
    """A name that ends in _ is the beginning of several."""
    found = set()
    for folder in ("distilldsm", "components", "pipeline", "docker", "docs", "tests/containers", "SECURITY.md"):
        for path in [ROOT / folder] if (ROOT / folder).is_file() else (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".sh") or path.name == "Dockerfile":
                found |= set(re.findall(r"\bDISTILLDSM_[A-Z_]*[A-Z]\b(?!_)", path.read_text(encoding="utf-8")))
    assert found == set(settings.VARIABLES)


def test_json_exit_codes_and_usage(place, capsys, monkeypatch):
    assert main(["doctor", "--json", "python", "kubeflow", "python"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["version"], told["ok"]) == (__version__, True)
    assert [(c["name"], c["status"]) for c in told["checks"]] == [("python", "ok"), ("kubeflow", "skip")]
    assert set(told["checks"][0]) == {"name", "status", "seen", "hint"}
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "nonsense")
    assert main(["doctor", "--json", "kubeflow"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main(["doctor", "pythn"]) == 2
    assert "python, packages, cpu" in capsys.readouterr().err
    assert main(["doctor", "--timeout", "0", "python"]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(check.name in told for check in doctor.CHECKS)


@pytest.mark.slow
def test_all_of_it_changes_nothing(place, empty_store):
    """The whole command, with the processes it starts, beside a store that is in use."""
    shutil.copyfile(empty_store, place / "mlflow.db")
    shutil.copyfile(ROOT / "params.yaml", place / "params.yaml")
    before = contents(place)
    done = subprocess.run(
        [sys.executable, "-m", "distilldsm", "doctor", "--json", "--timeout", "60"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    assert found["openvino"]["status"] == "ok"
    assert "--precision auto selects" in found["openvino"]["seen"]
    assert found["mlflow"]["status"] == "ok"
    assert "read back and deleted" in found["mlflow"]["seen"]
    after = contents(place)
    assert sorted(after) == sorted(before)
    assert after["params.yaml"] == before["params.yaml"]
