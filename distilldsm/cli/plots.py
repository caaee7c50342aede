"""`distilldsm plots`: DVC's plots as a page that needs no network.

DVC's own page loads Vega from another machine. It takes a template of the page, though: ours holds the scripts.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from distilldsm.core.errors import ConfigError
from distilldsm.core.shell import run_shell

COMMANDS = ("show", "diff")
_STYLE = "body{font:15px system-ui,sans-serif;margin:1rem;display:flex;flex-wrap:wrap;gap:1.5rem}"


def page_template() -> str:
    """DVC's page template with Vega in it; `{plot_divs}` is where DVC puts the plots."""
    script = gzip.decompress(files("distilldsm.cli").joinpath("vega.js.gz").read_bytes()).decode("utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Plots</title>{refresh_tag}\n'
        f"<style>{_STYLE}</style>\n<script>{script}</script></head>\n<body>{{plot_divs}}</body></html>\n"
    )


def parser() -> argparse.ArgumentParser:
    """For its help only: the arguments are DVC's."""
    made = argparse.ArgumentParser(
        prog="distilldsm plots", description="DVC's plots as a page that needs no network.", add_help=False
    )
    made.add_argument("command", choices=COMMANDS, help="of dvc plots, of experiments or commits side by side")
    made.add_argument("arguments", nargs="*", help="of that command, see dvc plots show --help")
    return made


def main(argv: Sequence[str]) -> int:
    """`dvc plots show` or `dvc plots diff` with all their arguments; returns the exit code."""
    code = 0
    if argv and argv[0] in ("-h", "--help"):
        parser().print_help()
        return 0

    def command() -> None:
        nonlocal code
        if not argv or argv[0] not in COMMANDS:
            raise ConfigError(
                "no such command",
                where="distilldsm plots",
                seen=argv[0] if argv else "none",
                rule="show or diff, then arguments of dvc plots",
                hint="e.g. distilldsm plots diff HEAD~1 -o dvc_plots",
            )
        with tempfile.TemporaryDirectory() as folder:
            template = Path(folder) / "page.html"
            template.write_text(page_template(), encoding="utf-8")
            run = [sys.executable, "-m", "dvc", "plots", argv[0], "--html-template", str(template), *argv[1:]]
            code = subprocess.run(run, check=False).returncode

    return run_shell(command) or min(code, 1)
