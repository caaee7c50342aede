"""`distilldsm drift`: compare new scans with a model's training data. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.text import one_line

DESCRIPTION = (
    "Compare scans with the training data of an exported model: geometry, intensities as stored and as the network "
    "sees them, and structures in masks. The network does not run, and anatomy is not checked: a scan that looks like "
    "the training data may still be segmented wrongly."
)
EPILOG = (
    "exit codes: 0 all scans were compared; 1 a scan could not be read, or drift was found with --fail; 2 usage. "
    "See docs/drift.md."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model_dir", metavar="MODEL", help="directory, e.g. export/fold0, or name")
    parser.add_argument(
        "inputs", metavar="SCAN", nargs="+", help="NIfTI files, DICOM series or folders, as for predict"
    )
    parser.add_argument(
        "--masks", metavar="DIR", help="folder of masks, named like the scans; their structures are compared too"
    )
    parser.add_argument("-o", "--output", metavar="FILE.html", help="write a page with all measures")
    parser.add_argument("--fail", action="store_true", help="exit with 1 if drift was found")
    parser.add_argument(
        "--max-memory", metavar="GB", type=float, help="refuse scans that need more memory (default: as for predict)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON report")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UserError: a scan could not be read (the others are compared first), or drift was found with `--fail`.
    """
    output = _output(args.output)
    from distilldsm.core.machine import budget_bytes
    from distilldsm.data.plan import Plan
    from distilldsm.data.training_distribution import DISTRIBUTION, load_distribution
    from distilldsm.drift import drift_of_files
    from distilldsm.models.catalogue import model_directory
    from distilldsm.models.package import load_metadata, verify

    model = model_directory(args.model_dir)
    metadata = load_metadata(model)
    distribution = load_distribution(model)
    verify(model, ["plan.json", DISTRIBUTION])
    report = drift_of_files(
        model,
        [Path(p) for p in args.inputs],
        masks=None if args.masks is None else Path(args.masks),
        name=metadata.name,
        budget=budget_bytes(args.max_memory),
    )
    if output is not None:
        from distilldsm.drift.report import render

        output.write_text(render(report, distribution, Plan.load(model / "plan.json")), encoding="utf-8")
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    failures = report["failures"]
    for failure in failures:
        print(f"error: {failure['message']}", file=sys.stderr)
    if failures:
        raise DataError(
            f"{len(failures)} of {len(failures) + len(report['scans'])} scans could not be compared",
            seen=", ".join(f["scan"] for f in failures),
            hint="see the errors above; the other scans were compared",
        )
    if report["drift"] and args.fail:
        raise DataError("scans differ from the training data", where=model, hint="see the findings above")


def _output(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if path.suffix != ".html" or not path.parent.is_dir():
        raise ConfigError("cannot hold the report", where=path, rule="an .html file in an existing directory")
    return path


def _print(report: dict[str, Any]) -> None:
    from distilldsm.drift.report import sentence, set_sentence, verdict

    measures = report["measures"]
    for row in report["scans"]:
        serious = [o for o in row["outside"] if not o["undone"]]
        state = f"outside in {len(serious)} of {len(row['values'])} measures" if serious else "inside"
        print(f"{one_line(row['scan'])}: {state}")
        for remark in row["remarks"]:
            print(f"  {one_line(remark)}")
        for one in row["outside"]:
            print(f"  {sentence(one, measures)}")
    for one in report["together"]:
        print(f"  {set_sentence(one, measures)}")
    print(verdict(report))
