"""`make audit`: what it says, and when it fails, whatever pip-audit and the network do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ask(tmp_path, audit, monkeypatch):
    """Run the audit with a pip-audit that answers as told, per service; returns the exit code."""

    def run(pypi: object, osv: object = "away", *, ci: bool = False, ignore: str = "", seconds: float = 30) -> int:
        monkeypatch.setenv("CI", "true" if ci else "false")
        answers = {"pypi": pypi, "osv": osv}
        program = tmp_path / "pip-audit"
        program.write_text(
            f"#!{sys.executable}\nimport json, sys, time\nanswers = {answers!r}\nline = sys.argv\n"
            f"open({str(tmp_path / 'lines')!r}, 'a').write(json.dumps(line) + '\\n')\n"
            "answer = answers[line[line.index('-s') + 1]]\n"
            "if answer == 'slow': time.sleep(60)\n"
            "if isinstance(answer, str): sys.exit('no route to host')\n"
            "print(json.dumps({'dependencies': answer}))\n"
            "sys.exit(any(one.get('vulns') for one in answer))\n"
        )
        program.chmod(0o755)
        (tmp_path / "ignore").write_text(ignore)
        arguments = ["--tool", str(program), "--ignore", str(tmp_path / "ignore"), "--seconds", str(seconds)]
        return audit.main(arguments)

    return run


def fine(name: str) -> dict:
    return {"name": name, "version": "1.0", "vulns": []}


def skipped(name: str) -> dict:
    return {"name": name, "skip_reason": "not found"}


BAD = {"name": "bad", "version": "2.0", "vulns": [{"id": "CVE-2026-1", "fix_versions": ["2.1"]}]}


def test_nothing_known(ask, capsys, tmp_path):
    assert ask([fine("a"), fine("b"), skipped("torch")]) == 0
    out = capsys.readouterr().out
    assert "0 known vulnerabilities in 2 packages" in out
    assert "does not know: torch" in out
    line = json.loads((tmp_path / "lines").read_text())
    assert str(ROOT / "constraints.txt") in line


@pytest.mark.parametrize("ci", [False, True])
def test_a_known_vulnerability_fails_in_ci_too(ask, capsys, ci):
    assert ask([fine("a"), BAD], ci=ci) == 1
    assert "bad 2.0: CVE-2026-1 (fixed in 2.1)" in capsys.readouterr().out
    assert ask("away", [BAD], ci=ci) == 1


@pytest.mark.parametrize("answer", ["away", [], [skipped("a"), skipped("b"), fine("c")]], ids=str)
def test_a_database_out_of_reach_is_said_and_fails_only_outside_ci(ask, capsys, answer):
    assert ask(answer) == 2
    assert "NOT AUDITED" in capsys.readouterr().err
    assert ask(answer, ci=True) == 0
    assert "NOT AUDITED" in capsys.readouterr().err


def test_it_does_not_wait_for_ever(ask, capsys):
    assert ask("slow", "slow", seconds=1.0) == 2
    assert "no answer in time" in capsys.readouterr().err


def test_what_is_left_out_has_a_reason(ask, tmp_path):
    assert ask([fine("a")], ignore="# why\n\nCVE-2026-1 we do not call it\n") == 0
    line = json.loads((tmp_path / "lines").read_text())
    assert line[line.index("--ignore-vuln") + 1] == "CVE-2026-1"
    with pytest.raises(SystemExit, match="without a reason"):
        ask([fine("a")], ignore="CVE-2026-1\n")


def test_ci_runs_it_after_the_tests():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines.index("make test") < next(k for k, line in enumerate(lines) if line.endswith("make audit"))
    assert (ROOT / ".ci/audit-ignore").is_file()
