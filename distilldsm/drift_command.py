"""`distilldsm drift`: whether new scans look like what a model was trained on. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from distilldsm.data.plan import Plan
    from distilldsm.drift.compare import Reference
    from distilldsm.inference.inputs import Input


def add_drift(commands: Any) -> None:
    """Add the sub-command to a parser's sub-commands."""
    drift = commands.add_parser(
        "drift",
        help="whether scans look like what a model was trained on",
        description="Compares scans with the training data of an exported model: geometry, intensities as stored and "
        "as the network sees them, structures of masks. It needs no network and sees no anatomy: scans inside are no "
        "proof that predictions are right.",
        epilog="exit codes: 0 all scans compared, whatever was found; 1 a scan could not be read, or with --fail drift "
        "was found; 2 usage. docs/drift.md tells more.",
    )
    drift.add_argument("model_dir", metavar="MODEL_DIR", help="what the export stage wrote, e.g. export/fold0")
    drift.add_argument(
        "inputs", metavar="SCAN", nargs="+", help="NIfTI files or DICOM series, or folders, as for predict"
    )
    drift.add_argument(
        "--masks", metavar="DIR", help="masks called as the scans (predict's output folder): compares structures too"
    )
    drift.add_argument("-o", "--output", metavar="FILE.html", help="write a page with all measures")
    drift.add_argument("--fail", action="store_true", help="exit with 1 where drift was found")
    drift.add_argument(
        "--max-memory", metavar="GB", type=float, help="refuse scans that take more (default: as predict)"
    )
    drift.add_argument("--json", action="store_true", help="print a JSON report")


def drift(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UserError: a scan could not be read (the others are compared first), or `--fail` and drift.
    """
    from distilldsm.data.plan import Plan
    from distilldsm.drift.compare import check_scan, check_set, references
    from distilldsm.drift.fingerprint import FINGERPRINT, load_fingerprint
    from distilldsm.drift.measures import measures_of
    from distilldsm.drift.scans import check_masks
    from distilldsm.export.package import verify
    from distilldsm.inference.inputs import find_inputs
    from distilldsm.inference.memory import budget_bytes
    from distilldsm.progress import progress

    model = Path(args.model_dir)
    output = _output(args.output)
    budget = budget_bytes(args.max_memory)
    masks = None if args.masks is None else Path(args.masks)
    if masks is not None:
        check_masks(masks)
    metadata = verify(model, ["plan.json"])
    fingerprint = load_fingerprint(model)
    verify(model, [FINGERPRINT])
    plan = Plan.load(model / "plan.json")
    known = references(fingerprint, measures_of(plan))
    inputs, _ = find_inputs([Path(p) for p in args.inputs], len(plan.channels), [c.name for c in plan.channels])
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for one in progress(inputs, total=len(inputs), title="drift", unit="scan"):
        try:
            rows.append(_measure(one, plan, masks, budget))
        except (UserError, OSError, MemoryError) as error:
            failures.append(_failure(one, error))
    for row in rows:
        row["outside"] = check_scan(row["values"], known)
    together = check_set([row["values"] for row in rows], known)
    drifted = any(not o.undone for row in rows for o in row["outside"]) or any(not f.undone for f in together)
    report = {
        "schema_version": 1,
        "model": metadata.name,
        "trained_on": {
            "data_set": fingerprint.name,
            "cases": fingerprint.cases,
            "orientations": dict(fingerprint.orientations),
        },
        "drift": drifted,
        "measures": {name: _describe(reference) for name, reference in known.items()},
        "scans": rows,
        "together": together,
        "failures": failures,
    }
    from distilldsm.params import to_mapping

    report = to_mapping(report)
    if output is not None:
        from distilldsm.drift.report import render

        output.write_text(render(report, fingerprint, known), encoding="utf-8")
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    for failure in failures:
        print(f"error: {failure['message']}", file=sys.stderr)
    if failures:
        raise DataError(
            f"{len(failures)} of {len(inputs)} scans could not be compared",
            seen=", ".join(f["scan"] for f in failures),
            mend="see the errors above; the others were compared",
        )
    if drifted and args.fail:
        raise DataError("scans differ from what the model was trained on", where=model, mend="see the findings above")


def _output(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if path.suffix != ".html" or not path.parent.is_dir():
        raise ConfigError("cannot hold the report", where=path, rule="a file .html in an existing directory")
    return path


def _measure(one: Input, plan: Plan, masks: Path | None, budget: int) -> dict[str, Any]:
    from distilldsm.drift.measures import values_of
    from distilldsm.drift.scans import find_mask, measure_scan, read_mask

    scan = one.read(len(plan.channels), budget)
    found = None if masks is None else find_mask(masks, one)
    classes = None if found is None else read_mask(found, scan, plan)
    measured = measure_scan(scan, plan, classes)
    return {
        "scan": one.name,
        "mask": None if found is None else found.name,
        "orientation": measured.orientation,
        "values": {name: float(f"{v:.6g}") for name, v in values_of(measured, plan).items()},
    }


def _failure(one: Input, error: Exception) -> dict[str, Any]:
    text = str(error) if isinstance(error, UserError) else f"{one.paths[0]}: {type(error).__name__}: {error}"
    return {"scan": one.name, "message": text}


def _describe(reference: Reference) -> dict[str, Any]:
    m = reference.measure
    numbers = {key: float(f"{getattr(reference, key):.6g}") for key in ("low", "high", "median")}
    return {"title": m.title, "unit": m.unit, "group": m.group, "undone": m.undone, **numbers}


def _print(report: dict[str, Any]) -> None:
    from distilldsm.drift.report import sentence, set_sentence, verdict

    measures = report["measures"]
    for row in report["scans"]:
        serious = [o for o in row["outside"] if not o["undone"]]
        state = f"outside in {len(serious)} of {len(row['values'])} measures" if serious else "inside"
        print(f"{row['scan']}: {state}")
        for one in row["outside"]:
            print(f"  {sentence(one, measures)}")
    for one in report["together"]:
        print(f"  {set_sentence(one, measures)}")
    print(verdict(report))
