"""`distilldsm plots`: DVC's plots as a page that works offline.

DVC's own page loads Vega, which draws the plots, from another machine. DVC accepts a template for the page; ours
contains Vega.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = ("show", "diff")


def page_template() -> str:
    """Our page template for DVC, with Vega in it; DVC replaces `{plot_divs}` by the plots."""
    from distilldsm.report.page import render

    return render("plots.html", title="Plots")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("command", choices=COMMANDS, help="command of dvc plots; diff compares experiments or commits")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments, see dvc plots show --help")


def run(args: argparse.Namespace) -> int:
    """Run `dvc plots show` or `dvc plots diff` with all their arguments; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "page.html"
        template.write_text(page_template(), encoding="utf-8")
        command = [sys.executable, "-m", "dvc", "plots", args.command, "--html-template", str(template)]
        return min(subprocess.run([*command, *args.arguments], check=False).returncode, 1)
