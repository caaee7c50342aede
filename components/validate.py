"""Stage validate: every case against the expectation suite; all findings in one report."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from components._main import stage_main
from distilldsm.config import ValidateConfig, load_params
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.expectations import Finding, bound_rules, check, load_suite
from distilldsm.data.validation import build_case_table
from distilldsm.data.validation_report import render_validation
from distilldsm.errors import DataError
from distilldsm.params import to_mapping
from distilldsm.stage import output_directory, write_json


def run(config: ValidateConfig, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Check every case.

    Args:
        inputs: `dataset`.
        outputs: `validation`: `report.html`, `report.json`, `cases.csv`, `accepted.json`, `metrics.json`.

    Raises:
        DataError: findings of severity error with `on_invalid: fail`; the report then lies in `<validation>-failed`.
            Or too few cases are left with `exclude`.
    """
    index = DatasetIndex.load(inputs["dataset"])
    suite = load_suite(config.suite)
    rows = build_case_table(inputs["dataset"], index, workers=config.workers)
    findings = check(rows, suite, config.bounds, index, config.suite)
    excluded: dict[str, list[str]] = {}
    for finding in findings:
        if finding.severity == "error":
            excluded.setdefault(finding.case, []).append(finding.rule)
    failed = bool(excluded) and config.on_invalid == "fail"
    target = outputs["validation"]
    if failed:
        target = target.with_name(f"{target.name}-failed")
    hashed = {"dataset": inputs["dataset"], "suite": Path(config.suite)}
    with output_directory(target, stage="validate", config=config, inputs=hashed) as work:
        accepted = [case.id for case in index.cases if case.id not in excluded]
        errors = sum(f.severity == "error" for f in findings)
        metrics = {
            "cases": len(rows),
            "accepted": len(accepted),
            "errors": errors,
            "warnings": len(findings) - errors,
        }
        write_json(work / "metrics.json", metrics)
        write_json(work / "accepted.json", {"accepted": accepted, "excluded": excluded})
        write_json(
            work / "report.json",
            {"schema_version": 1, "counts": metrics, "findings": findings, "suite": to_mapping(suite)},
        )
        with open(work / "cases.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        rules = [*suite.rules, *bound_rules(config.bounds)]
        page = render_validation(index, rows, findings, rules, excluded)
        (work / "report.html").write_text(page, encoding="utf-8")
    _conclude(config, findings, metrics, index.subset(set(accepted)) if accepted else None, target, failed)


def _conclude(
    config: ValidateConfig,
    findings: Sequence[Finding],
    metrics: Mapping[str, int],
    left: DatasetIndex | None,
    target: Path,
    failed: bool,
) -> None:
    serious = [f for f in findings if f.severity == "error"]
    shown = "\n".join(f"- {f}" for f in serious[:10])
    if failed:
        more = f"\n(and {len(serious) - 10} more)" if len(serious) > 10 else ""
        raise DataError(
            f"{len(serious)} error(s) in {len({f.case for f in serious})} of {metrics['cases']} cases\n{shown}{more}",
            mend=f"see {target / 'report.html'}; mend the cases, or set validate.on_invalid: exclude",
        )
    if left is None or len({case.patient for case in left.cases}) < 2:
        raise DataError("fewer than two valid patients are left", where=target / "report.html", seen=shown)
    print(
        f"{metrics['cases']} cases: {metrics['accepted']} accepted, {metrics['errors']} errors, "
        f"{metrics['warnings']} warnings"
    )
    for finding in serious[:10]:
        print(f"left out: {finding}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="validate", description=__doc__)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--dataset", type=Path, default=Path("data/raw"))
    parser.add_argument("--output", type=Path, default=Path("data/validation"))
    args = parser.parse_args(argv)
    return stage_main(
        lambda: run(load_params(args.params).validate, {"dataset": args.dataset}, {"validation": args.output})
    )


if __name__ == "__main__":
    raise SystemExit(main())
