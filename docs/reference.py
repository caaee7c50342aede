"""Writes the reference of all parameters and commands as Markdown: `python docs/reference.py FOLDER` (`make docs`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from distilldsm.cli.main import COMMANDS, stages
from distilldsm.config.reference import as_markdown, matching


def commands() -> str:
    """What `--help` says, of the whole and of every command."""
    lines = ["# Commands", ""]
    for words in ([], *([name] for name in (*stages(), *COMMANDS))):
        shown = " ".join(["distilldsm", *words])
        text = subprocess.run(
            [sys.executable, "-m", "distilldsm", *words, "--help"],
            env={**os.environ, "COLUMNS": "110", "NO_COLOR": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        lines += [f"## {shown}", "", "```", text.rstrip(), "```", ""]
    return "\n".join(lines)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parameters.md").write_text(as_markdown(matching([])), encoding="utf-8")
    (folder / "commands.md").write_text(commands(), encoding="utf-8")
    print(f"{folder}/parameters.md, {folder}/commands.md")


if __name__ == "__main__":
    main()
