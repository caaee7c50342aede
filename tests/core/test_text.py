"""Names that mean harm, in each kind of output."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest

from distilldsm.core.errors import UserError
from distilldsm.core.text import csv_cell, from_csv_cell, is_plain, markdown, one_line
from distilldsm.data.dataset import Case, DatasetIndex
from distilldsm.evaluation.metrics import METRICS, VOLUMES
from distilldsm.evaluation.scoring import write_plots
from distilldsm.evaluation.tables import read_rows, write_csv
from distilldsm.io.output import write_volumes
from distilldsm.report.page import render

SCRIPT = "</script><script>run()</script>"
HOSTILE = (SCRIPT, "<!--", "=1+1", "@SUM(A1)", "+a", "-a", "'=a", "a|b", "[x](http://h)", "`a`")
CONTROL = ("a\x1b[2Jb", "a\nerror: b", "a\rb", "a\x9bb", "a\u202eb", "a\udcffb", "a\x00b", "a\x7f", "a\u2028b")


@pytest.mark.parametrize("name", CONTROL)
def test_a_name_cannot_steer_the_terminal_or_forge_a_line(name):
    assert one_line(name).isprintable()
    assert not is_plain(name)
    text = str(UserError("is bad", where=name, seen=f"x{name}", rule=name, hint=name))
    lines = text.split("\n")
    assert all(line.replace("\t", "").isprintable() for line in lines)
    assert [line for line in lines if not line.startswith("    ")] == [
        line for line in lines if line.startswith((one_line(name), "  seen: ", "  rule: ", "  hint: "))
    ]
    assert sum(line.startswith("  hint: ") for line in lines) == 1
    with pytest.raises(UserError, match="control characters"):
        DatasetIndex(name="n", channels=(), labels={"background": 0, name: 1}, cases=(case("c"),))
    with pytest.raises(UserError, match="cannot be a file name"):
        case(name).check_names()


def case(name: str) -> Case:
    return Case(id=name, patient="p", images=("c.nii.gz",), label="s.nii.gz")


PRINTER = """
import sys
from distilldsm.core.errors import UserError
from distilldsm.core.progress import progress
from distilldsm.core.shell import run_shell

def run():
    print("a\\x1b[31m \\xe4 \\udcff\\rb\\tc")
    print("\\x1b]0;title\\x07", file=sys.stderr)
    list(progress([1], total=1, title="t\\x1b[1m", unit="case"))
    raise UserError("no \\u20ac", where="\\x1b[1m")

sys.exit(run_shell(run))
"""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_what_is_printed_is_plain_whatever_the_locale(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "DISTILLDSM_PROGRESS": "plain", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", PRINTER], env=environment, capture_output=True)
    assert done.returncode == 1, done.stderr
    shown = {"ascii": r"\xe4"}.get(encoding, "ä")
    assert done.stdout.decode(encoding) == f"a\\x1b[31m {shown} \\udcff\\rb\tc\n"
    assert b"Traceback" not in done.stderr
    assert all(line.isprintable() for line in done.stderr.decode(encoding).splitlines())
    assert b"\\x1b[1m: no " in done.stderr


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_closed_streams_are_the_null_device(tmp_path, closed):
    """A file that is opened later must not get their number: libraries print into it."""
    program = (
        "import os, sys; from distilldsm.core.shell import run_shell\n"
        "def run():\n"
        "    with open(sys.argv[1], 'w') as stream:\n"
        "        assert stream.fileno() > 2\n"
        "        print('shown'); print('remark', file=sys.stderr); sys.stdin.read()\n"
        "        os.write(1, b'by a library'); os.write(2, b'by a library')\n"
        "        stream.write('content')\n"
        "sys.exit(run_shell(run))\n"
    )
    redirected = " ".join(f"{number}>&-" for number in closed)
    command = f'exec "$0" -c "$1" "$2" {redirected}'
    arguments = ["sh", "-c", command, sys.executable, program, str(tmp_path / "file")]
    done = subprocess.run(arguments, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "content"
    assert (b"shown" in done.stdout) == (1 not in closed)


@pytest.mark.parametrize("name", HOSTILE)
def test_cells_are_no_formulas_and_come_back(tmp_path, name):
    row = {"case": name, "patient": name, "label": name, **dict.fromkeys((*METRICS, *VOLUMES), -0.5)}
    write_csv(tmp_path / "a.csv", [row])
    with open(tmp_path / "a.csv", newline="") as stream:
        [written] = csv.DictReader(stream)
    assert not written["case"].startswith(("=", "+", "-", "@"))
    assert written["dice"] == "-0.5"
    assert read_rows(tmp_path / "a.csv") == [row]
    assert from_csv_cell(csv_cell(name)) == name
    write_volumes(tmp_path / "b.csv", {name: {name: 1.0}})
    with open(tmp_path / "b.csv", newline="") as stream:
        assert list(csv.reader(stream))[1] == [csv_cell(name), csv_cell(name), "1"]


def test_a_label_does_not_end_the_script_of_dvcs_page(tmp_path):
    """DVC puts the cells of plots into a script as JSON, which does not escape them."""
    name = SCRIPT
    index = DatasetIndex(name="n", channels=(), labels={"background": 0, name: 1}, cases=(case(name),))
    rows = [{"case": name, "label": name, "dice": 0.5, "hd95_mm": 1.0, "volume_truth_ml": 2.0}]
    history = [{"epoch": 1, "train_loss": 1.0, "learning_rate": 0.1, "val_dice": {name: 0.4}, "val_dice_mean": 0.4}]
    write_plots(tmp_path, rows, history, {name: {"confusion": [[9, 1], [0, 5]]}}, index)
    for path in tmp_path.iterdir():
        assert "<" not in path.read_text(), path
    assert "\u2039/script>" in (tmp_path / "dice_by_case.csv").read_text()


@pytest.mark.parametrize("name", [*HOSTILE, "a\n\n# b", "a\r<b>"])
def test_markdown_shows_names_as_they_are(name):
    text = markdown(name)
    assert "\n" not in text
    assert "<" not in text.replace(r"\<", "")
    assert "|" not in text.replace(r"\|", "")
    assert "[" not in text.replace(r"\[", "")


def test_data_in_a_page_cannot_end_their_script():
    viewer = {"description": {"cases": [{"name": SCRIPT}]}, "contents": {}}
    page = render("viewer_fragment.html", viewer=viewer)
    data = page.split('id="dsm-viewer-cases">')[1].split("</script>")[0]
    assert json.loads(data) == viewer["description"]
    assert "run()</script>" not in page
