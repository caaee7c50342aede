"""Every kind of damage that is planted, with the rules that must tell it and the file they must name.

A damage changes the files of one case in place, or of two where it is about how they relate; it may return the cases
anew where it changes the data set's index.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.damages.nifti import affine, vary
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.validation.expectations import Finding

Where = Literal["image", "label"]
Change = Callable[[Path, Sequence[Case], np.random.Generator], Sequence[Case] | None]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One kind of damage."""

    name: str
    rules: Mapping[str, Where]
    """Rules that must be broken, and in which of the case's files."""
    severity: Literal["error", "warning"]
    """The gravest finding that it must cause."""
    cases: int
    """How many cases it takes; a finding is expected on each of them."""
    change: Change

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A damage and the cases that it hit."""

    damage: Damage
    cases: tuple[Case, ...]

    def outcome(self, findings: Mapping[str, Sequence[Finding]]) -> tuple[bool, bool]:
        """Whether every hit case has a finding of at least the right severity, and all files and rules as declared."""
        found = named = True
        for case in self.cases:
            mine = findings.get(case.id, ())
            found &= any(f.severity == "error" or self.damage.severity == "warning" for f in mine)
            told = {(f.rule, f.file) for f in mine}
            graver = any(f.rule in self.damage.rules and f.severity == self.damage.severity for f in mine)
            files = {"image": case.images[0], "label": case.label}
            named &= graver and all((rule, files[where]) in told for rule, where in self.damage.rules.items())
        return found, found and named


DAMAGES: dict[str, Damage] = {}


def damage(
    severity: Literal["error", "warning"] = "error", cases: int = 1, **rules: Where
) -> Callable[[Change], Change]:
    """Register a function as a damage; the keywords say which rule must name which file."""

    def register(change: Change) -> Change:
        name = change.__name__  # type: ignore[attr-defined]
        assert name not in DAMAGES, name
        DAMAGES[name] = Damage(name=name, rules=rules, severity=severity, cases=cases, change=change)
        return change

    return register


def simple(
    name: str,
    where: Where | Literal["both"],
    function: Callable[[Path], object],
    *,
    severity: str = "error",
    **rules: Where,
) -> None:
    """Register a damage that does the same to the image, the label or both, whatever the seed."""

    def change(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
        for kind in ("image", "label") if where == "both" else (where,):
            function(root / (cases[0].images[0] if kind == "image" else cases[0].label))

    change.__name__ = name
    damage(severity, **rules)(change)  # type: ignore[arg-type]


def plant(root: Path, kind: Damage, cases: Sequence[Case], seed: int) -> Planted:
    """Damage cases in place; the same seed gives the same bytes."""
    assert len(cases) == kind.cases
    changed = kind.change(root, cases, np.random.default_rng(seed))
    return Planted(damage=kind, cases=tuple(cases if changed is None else changed))


def plant_all(root: Path, cases: Sequence[Case], seed: int) -> list[Planted]:
    """Every kind of damage in turn, again and again until the cases are used up."""
    done: list[Planted] = []
    left = list(cases)
    while True:
        for kind in DAMAGES.values():
            if len(left) < kind.cases:
                return done
            hit, left = left[: kind.cases], left[kind.cases :]
            done.append(plant(root, kind, hit, seed + len(done)))


def needed() -> int:
    """How many cases one of every kind takes."""
    return sum(kind.cases for kind in DAMAGES.values())


def copies(root: Path, index: DatasetIndex, target: Path, number: int, seed: int) -> list[Case]:
    """Copies of good cases of one channel in turn, each changed a little and a patient of its own."""
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
    made = []
    for k in range(number):
        good = index.cases[k % len(index.cases)]
        name = f"case_{k:05d}"
        case = Case(id=name, patient=name, images=(f"imagesTr/{name}.nii.gz",), label=f"labelsTr/{name}.nii.gz")
        for source, copy in ((good.images[0], case.images[0]), (good.label, case.label)):
            shutil.copyfile(root / source, target / copy)
            affine(target / copy, lambda m: m)  # both forms, as the damages expect them
        vary(target, case, np.random.default_rng((seed, k)))
        made.append(case)
    return made


def index_of(cases: Sequence[Case], labels: Mapping[str, int]) -> DatasetIndex:
    """A data set of one MRI channel."""
    channels = (Channel(name="MRI", modality="MRI"),)
    return DatasetIndex(name="damaged", channels=channels, labels=labels, cases=tuple(cases))


def as_patient(case: Case, patient: str) -> Case:
    return replace(case, patient=patient)


def by_case(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """The findings of each case."""
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(str(finding.case), []).append(finding)
    return found
