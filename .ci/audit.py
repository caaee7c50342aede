"""Compare constraints.txt with the databases of known vulnerabilities, by pip-audit.

Exit code: 0 none known, 1 some, 2 no database could be asked (0 where CI=true: a build must not fail with a network).
pip-audit itself says "No known vulnerabilities" where an index knows none of the packages: that counts as not asked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VERSION = "2.10.1"
SERVICES = ("pypi", "osv")


def tool(folder: Path) -> list[str]:
    """pip-audit's command, installed into `folder` if it is not there yet; empty where that fails."""
    program = folder / "bin" / "pip-audit"
    mark = folder / f".{VERSION}"
    if not mark.is_file():
        install = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*install, f"pip-audit=={VERSION}"]):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
            except subprocess.TimeoutExpired:
                print("pip-audit cannot be installed in time", file=sys.stderr)
                return []
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["?"])[-1]
                print(f"pip-audit cannot be installed: {reason[:300]}", file=sys.stderr)
                return []
        mark.touch()
    return [str(program)]


def ignored(path: Path) -> list[str]:
    """Options that leave out what a file names, `ID reason` a line; a line without a reason ends the program."""
    options = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        words = line.split(maxsplit=1)
        if not words or line.startswith("#"):
            continue
        if len(words) < 2:
            raise SystemExit(f"error: {path}: {words[0]} is left out without a reason")
        options += ["--ignore-vuln", words[0]]
    return options


def ask(command: Sequence[str], service: str, constraints: Path, seconds: float) -> tuple[list[Any] | None, str]:
    """What a service says of each package (None: it could not be asked), and why not."""
    line = [*command, "-s", service, "-r", str(constraints), "--no-deps", "--disable-pip", "-f", "json"]
    line += ["--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=max(seconds, 1), check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return None, "no answer in time"
    except OSError as error:
        return None, str(error)
    except (ValueError, KeyError, TypeError):
        return None, (done.stderr.strip().splitlines() or ["no answer"])[-1][:300]
    known = [package for package in packages if "skip_reason" not in package]
    if 2 * len(known) < len(packages) or not packages:
        return None, f"it knows {len(known)} of {len(packages)} packages"
    return packages, ""


def report(packages: Sequence[Any], service: str) -> int:
    """Print the vulnerabilities; how many there are."""
    found = 0
    for package in packages:
        for one in package.get("vulns", []):
            found += 1
            fixed = ", ".join(one.get("fix_versions", [])) or "no version yet"
            print(f"{package['name']} {package['version']}: {one['id']} (fixed in {fixed})")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    print(f"{service}: {found} known vulnerabilities in {len(packages) - len(skipped)} packages")
    if skipped:
        print(f"{service} does not know: {', '.join(skipped)}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--ignore", type=Path, default=ROOT / ".ci/audit-ignore")
    parser.add_argument("--tool", type=Path, help="pip-audit (default: one of its own in build/audit)")
    parser.add_argument("--seconds", type=float, default=180.0, help="for all services together (%(default)s)")
    args = parser.parse_args(argv)
    options = ignored(args.ignore)
    command = [str(args.tool)] if args.tool else tool(ROOT / "build/audit")
    end = time.monotonic() + args.seconds
    for service in SERVICES if command else ():
        packages, problem = ask([*command, *options], service, args.constraints, end - time.monotonic())
        if packages is not None:
            return 1 if report(packages, service) else 0
        print(f"{service} cannot be asked: {problem}", file=sys.stderr)
    ci = os.environ.get("CI") == "true"
    note = " (no error, as CI=true)" if ci else ""
    print(f"NOT AUDITED: no database of vulnerabilities can be reached from here{note}", file=sys.stderr)
    return 0 if ci else 2


if __name__ == "__main__":
    raise SystemExit(main())
