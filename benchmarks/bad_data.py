"""Damages copies of good cases in more than a thousand ways and measures how many damages validation finds.

    python -m benchmarks.bad_data                                    # synthetic cases
    python -m benchmarks.bad_data --real PATH/Task04_Hippocampus     # a folder or its .tar

Each case is a copy of a good one, changed slightly (duplicates would be a finding), then damaged. Undamaged copies and
the original data set are validated, too: any finding there is a false alarm. Prints a Markdown table. The exit code is
1 if a damage was missed or reported with the wrong file or rule, or if a good case has an error.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.damages import DAMAGES, Planted, by_case, copies, index_of, plant_all
from benchmarks.pipeline import ROOT, machine
from distilldsm.config import DownloadConfig
from distilldsm.data.archive import extract, find_root
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.layouts import index_dataset
from distilldsm.validation.case_table import build_case_table, table_columns
from distilldsm.validation.expectations import Finding, check_table, load_suite
from distilldsm.validation.report import make_report
from tests.data.volumes import write_dataset

SUITE = ROOT / "conf" / "expectations.yaml"


def processor_seconds() -> float:
    """CPU seconds of this process and its finished workers. Other programs on the machine do not change them."""
    return sum(os.times()[:4])


def validated(root: Path, index: DatasetIndex, workers: int = 0) -> tuple[tuple[Finding, ...], float, float]:
    """Validate a data set as the stage `validate` does. Returns findings, seconds and CPU seconds."""
    started, computed = time.perf_counter(), processor_seconds()
    suite = load_suite(SUITE, table_columns(index), {})
    table = build_case_table(root, index, workers=workers)
    findings = check_table(table, suite)
    make_report(index, table, suite, findings)
    return findings, time.perf_counter() - started, processor_seconds() - computed


def base_cases(real: Path | None, work: Path) -> tuple[Path, DatasetIndex]:
    """Good cases: the real data set (an archive is unpacked), else synthetic ones."""
    if real is None:
        return work, write_dataset(work, 40)
    root = real
    if real.is_file():
        root = find_root(extract(real, work))
    return root, index_dataset(root, DownloadConfig(source=str(real)), source=real.name)


def table_of(planted: Sequence[Planted], findings: Sequence[Finding]) -> tuple[list[str], int]:
    """Lines of a Markdown table, one per kind of damage, and the number of damages missed or reported wrongly."""
    reported = by_case(findings)
    counts: dict[str, Counter[str]] = {name: Counter() for name in DAMAGES}
    for one in planted:
        found, named = one.outcome(reported)
        counts[one.damage.name].update(planted=1, found=int(found), named=int(named))
    lines = ["| damage | rules | planted | found | file and rule right | missed |", "|---|---|---|---|---|---|"]
    total: Counter[str] = Counter()
    for name, count in counts.items():
        total.update(count)
        rules = ", ".join(DAMAGES[name].rules)
        missed = count["planted"] - count["found"]
        lines.append(f"| {name} | {rules} | {count['planted']} | {count['found']} | {count['named']} | {missed} |")
    missed = total["planted"] - total["found"]
    lines.append(f"| all | | {total['planted']} | {total['found']} | {total['named']} | {missed} |")
    return lines, total["planted"] - total["named"]


def alarms(findings: Sequence[Finding], cases: set[str]) -> list[str]:
    """The findings on these cases, one line each."""
    return [f"{f.severity}: {f.file}: {f.rule}: {f.seen}" for f in findings if f.case in cases]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="a data set of one channel, as a folder or .tar")
    parser.add_argument("--damaged", type=int, default=1100, help="damaged cases")
    parser.add_argument("--undamaged", type=int, default=200, help="good cases beside them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bad-data-") as folder:
        work = Path(folder)
        root, index = base_cases(args.real, work / "good")
        cases = copies(root, index, work / "damaged", args.damaged + args.undamaged, args.seed)
        planted = plant_all(work / "damaged", cases[: args.damaged], args.seed)
        hit = [case for one in planted for case in one.cases]
        good = cases[args.damaged :]
        findings, seconds, computed = validated(work / "damaged", index_of([*hit, *good], index.labels), args.workers)
        lines, wrong = table_of(planted, findings)
        false_alarms = alarms(findings, {case.id for case in good})
        checked, real_seconds, real_computed = validated(root, index, args.workers)
        real_alarms = alarms(checked, {case.id for case in index.cases})
    total = len(hit) + len(good)
    print("\n".join(lines))
    print(f"\n{machine()}")
    print(f"{len(planted)} damages in {len(hit)} cases, {wrong} of them missed or reported wrongly")
    print(f"{len(good)} undamaged cases beside them: {len(false_alarms)} false alarms")
    print(f"{len(index.cases)} cases of {index.name} as they are: {len(real_alarms)} alarms")
    for number, clock, cores in ((total, seconds, computed), (len(index.cases), real_seconds, real_computed)):
        print(
            f"{number} cases in {clock:.1f} s ({cores:.1f} processor seconds): for 1,000 cases "
            f"{1000 * clock / number:.1f} s ({1000 * cores / number:.1f})"
        )
    for line in (*false_alarms[:20], *real_alarms[:20]):
        print(line)
    errors = [line for line in (*false_alarms, *real_alarms) if line.startswith("error")]
    return 1 if wrong or errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
