"""Stage validate: checks every case against the expectation suite and reports all findings together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.hashes import MANIFEST
from distilldsm.core.output_directory import output_directory
from distilldsm.core.stage import Input, Output, Stage

if TYPE_CHECKING:
    from distilldsm.config import ValidateConfig
    from distilldsm.data.dataset import DatasetIndex
    from distilldsm.validation.case_table import CaseTable
    from distilldsm.validation.expectations import Checked

SHOWN = 10
"""Number of findings in the error message; the report has all of them."""


def run(config: ValidateConfig, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Check a data set.

    Args:
        inputs: `dataset` (from download).
        outputs: `validation`: report.json, report.html, data_docs/, cases.csv, accepted.json and metrics.json. If
            the data cannot be used, the same files go to `<validation>-failed`, and `validation` stays unchanged.

    Raises:
        ConfigError: the suite or the bounds are invalid.
        DataError: cases have errors (`on_invalid: fail`), or without them fewer than two patients remain.
    """
    from distilldsm.data.dataset import DatasetIndex
    from distilldsm.validation.case_table import build_case_table, table_columns
    from distilldsm.validation.expectations import load_suite, run_suite
    from distilldsm.validation.report import make_report

    root, target = Path(inputs["dataset"]), Path(outputs["validation"])
    index = DatasetIndex.load(root)
    suite = load_suite(config.suite, table_columns(index), config.bounds)
    table = build_case_table(root, index, workers=config.workers)
    checked = run_suite(table, suite)
    report = make_report(index, table, suite, checked.findings)
    failed = target.with_name(f"{target.name}-failed")
    problem = _problem(config, index, report)
    with output_directory(failed if problem else target, **STAGE.key(config, inputs)) as work:
        _write(work, report, table, checked)
    if problem:
        raise _refusal(problem, report, root, failed)
    if (failed / MANIFEST).is_file() and read_json(failed / MANIFEST).get("stage") == "validate":
        shutil.rmtree(failed)  # the errors it reported are fixed
    counts = report["counts"]
    print(
        f"{index.name}: {counts['accepted']} of {counts['cases']} cases accepted, {counts['errors']} errors, "
        f"{counts['warnings']} warnings; report: {target / 'report.html'}"
    )


def _problem(config: ValidateConfig, index: DatasetIndex, report: Mapping[str, Any]) -> str | None:
    """Why the data set cannot be used, or None."""
    counts = report["counts"]
    if config.on_invalid == "fail" and counts["errors"]:
        return f"{counts['errors']} errors in {counts['excluded']} of {counts['cases']} cases"
    if any(f["severity"] == "error" and f["case"] is None for f in report["findings"]):
        return "a rule for the whole data set is broken"
    accepted = {case.patient for case in index.subset(set(report["accepted"])).cases} if report["accepted"] else set()
    if len(accepted) < 2:
        patients = "1 patient" if len(accepted) == 1 else f"{len(accepted)} patients"
        remaining = f"left after {counts['errors']} errors" if counts["errors"] else "in all"
        return f"{patients} {remaining}, but a split needs at least 2"
    return None


def _refusal(problem: str, report: Mapping[str, Any], root: Path, failed: Path) -> DataError:
    findings = [f for f in report["findings"] if f["severity"] == "error"]
    lines = [
        f"\n    {root / f['file']}: {f['message']} ({f['rule']})\n      seen: {f['seen']}\n      hint: {f['hint']}"
        for f in findings[:SHOWN]
    ]
    if len(findings) > SHOWN:
        lines.append(f"\n    ... and {len(findings) - SHOWN} more")
    counts = report["counts"]
    too_few = not findings  # patients
    advice = "add cases" if too_few else "fix the files, or exclude these cases (validate.on_invalid: exclude)"
    return DataError(
        f"the data set cannot be used: {problem}",
        where=root,
        seen=f"{counts['errors']} errors, {counts['warnings']} warnings" + "".join(lines),
        rule="two patients at least, to hold one out" if too_few else "every case fulfils the expectation suite",
        hint=f"read {failed / 'report.html'}; {advice}",
    )


def _write(work: Path, report: Mapping[str, Any], table: CaseTable, checked: Checked) -> None:
    from distilldsm.validation.report import render_html

    write_json(work / "report.json", report)
    (work / "report.html").write_text(render_html(report, table), encoding="utf-8")
    checked.write_data_docs(work / "data_docs", name=report["dataset"]["name"])
    table.write_csv(work / "cases.csv")
    write_json(work / "accepted.json", {"accepted": report["accepted"], "excluded": report["excluded"]})
    write_json(work / "metrics.json", report["counts"])


def facts(inputs: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """Numbers of cases, errors and warnings."""
    return dict(read_json(output / "metrics.json"))


STAGE = Stage(
    name="validate",
    help="check every case against the expectation suite",
    section="validate",
    inputs=(Input(name="dataset", path="data/raw"),),
    outputs=(
        Output(
            name="validation",
            path="data/validation",
            kind="Dataset",
            parts=("accepted.json", "cases.csv", "data_docs", "manifest.json", "report.html", "report.json"),
        ),
        Output(name="report", path="data/validation/report.html", kind="HTML"),
        Output(name="metrics", path="data/validation/metrics.json", kind="Metrics", metric=True),
    ),
    scope="data",
    image="data",
    run=run,
    code=("data", "io", "report", "validation"),
    files=("suite",),
    facts=facts,
)


if __name__ == "__main__":
    from distilldsm.components.command import main

    raise SystemExit(main(STAGE))
