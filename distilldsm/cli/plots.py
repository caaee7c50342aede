"""`distilldsm plots`: DVC's plots as a page that needs no network.

DVC's own page loads Vega from another machine. It takes a template of the page, though: ours holds the scripts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = ("show", "diff")


def page_template() -> str:
    """DVC's page template with Vega in it; `{plot_divs}` is where DVC puts the plots."""
    from distilldsm.report.page import render

    return render("plots.html", title="Plots")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("command", choices=COMMANDS, help="of dvc plots, of experiments or commits side by side")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of that command, see dvc plots show --help")


def run(args: argparse.Namespace) -> int:
    """`dvc plots show` or `dvc plots diff` with all their arguments; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "page.html"
        template.write_text(page_template(), encoding="utf-8")
        command = [sys.executable, "-m", "dvc", "plots", args.command, "--html-template", str(template)]
        return min(subprocess.run([*command, *args.arguments], check=False).returncode, 1)
