"""Every kind of damage is found, with its case, file and rule; good cases beside them stay unaccused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.damages import DAMAGES, by_case, copies, digests, index_of, needed, plant, plant_all
from benchmarks.damages.nifti import raw, store
from distilldsm.config import DownloadConfig
from distilldsm.core.errors import DataError
from distilldsm.data.archive import extract, find_root
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.layouts import index_dataset
from distilldsm.io import read_labels, read_scan
from distilldsm.validation.case_table import build_case_table, table_columns
from distilldsm.validation.expectations import Finding, check_table, load_suite
from tests.data.volumes import write_dataset

SUITE = Path(__file__).resolve().parents[2] / "conf" / "expectations.yaml"
GOOD = 25
"""Undamaged cases beside the damaged ones."""


def validated(root: Path, index: DatasetIndex) -> tuple[Finding, ...]:
    suite = load_suite(SUITE, table_columns(index), {})
    return check_table(build_case_table(root, index, workers=1), suite)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> SimpleNamespace:
    """One of every damage and some good cases in one data set, validated once."""
    work = tmp_path_factory.mktemp("damages")
    good = write_dataset(work / "good", 6)
    root = work / "damaged"
    cases = copies(work / "good", good, root, needed() + GOOD, seed=1)
    planted = plant_all(root, cases[: needed()], seed=1)
    undamaged = cases[needed() :]
    before = digests(root)
    index = index_of([*(case for one in planted for case in one.cases), *undamaged], good.labels)
    findings = validated(root, index)
    return SimpleNamespace(
        planted={one.damage.name: one for one in planted},
        undamaged=undamaged,
        told=by_case(findings),
        before=before,
        after=digests(root),
        root=root,
    )


def test_there_are_many_kinds_of_damage_but_not_too_many_for_a_test():
    assert len(DAMAGES) >= 100
    assert needed() + GOOD <= 200


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_with_its_file_and_rule(everything, name):
    planted = everything.planted[name]
    told = {c.id: [(f.severity, f.rule, f.file, f.seen) for f in everything.told.get(c.id, [])] for c in planted.cases}
    assert planted.outcome(everything.told) == (True, True), (planted.damage.rules, told)
    for case in planted.cases:  # only what was touched is accused
        for finding in everything.told[case.id]:
            assert finding.file in (*case.images, case.label)
            assert finding.seen
            assert finding.hint


def test_good_cases_beside_them_are_clean(everything):
    assert {case.id: everything.told[case.id] for case in everything.undamaged if case.id in everything.told} == {}


def test_nothing_is_written_below_the_data_set(everything):
    assert everything.after == everything.before


def test_the_same_seed_plants_the_same_bytes(tmp_path):
    good = write_dataset(tmp_path / "good", 3)
    for run in ("a", "b"):
        cases = copies(tmp_path / "good", good, tmp_path / run, 6, seed=3)
        for k, name in enumerate(("gzip_one_bit", "image_scrambled", "random_bytes", "leakage_with_another_label")):
            kind = DAMAGES[name]
            plant(tmp_path / run, kind, cases[k : k + kind.cases], seed=3)
    contents = [{name: raw_or_bytes(tmp_path / run / name) for name in digests(tmp_path / run)} for run in ("a", "b")]
    assert contents[0] == contents[1]


def raw_or_bytes(path: Path) -> bytes:
    """The content without the time of writing that gzip stores in its own header."""
    return path.read_bytes()[10:]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("volumes")
    good = write_dataset(root / "good", 4)
    cases = copies(root / "good", good, root / "flipped", 4, seed=5)
    contents = {file: bytes(raw(root / "flipped" / file)) for c in cases for file in (c.images[0], c.label)}
    return SimpleNamespace(root=root / "flipped", cases=cases, contents=contents, labels=good.labels)


FLIPS = st.lists(st.tuples(st.booleans(), st.integers(0, 347), st.integers(0, 255)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(flips=st.lists(FLIPS, min_size=4, max_size=4))
def test_random_header_bytes_are_told_or_harmless(volumes, flips):
    """What validation accepts the next stages can read: no third way, and never a crash."""
    for case, changes in zip(volumes.cases, flips, strict=True):
        changed = {file: bytearray(volumes.contents[file]) for file in (case.images[0], case.label)}
        for in_image, at, value in changes:
            changed[case.images[0] if in_image else case.label][at] = value
        for file, content in changed.items():
            store(volumes.root / file, content, level=1)
    told = by_case(validated(volumes.root, index_of(volumes.cases, volumes.labels)))
    for case in volumes.cases:
        findings = told.get(case.id, [])
        assert {f.file for f in findings} <= {case.images[0], case.label}
        if not any(f.severity == "error" for f in findings):
            image, label = (volumes.root / file for file in (case.images[0], case.label))
            scan = read_scan([image], 1)
            assert np.isfinite(scan.intensities()).all()
            assert set(np.unique(read_labels(label, on=scan).values)) <= set(volumes.labels.values())


def test_what_the_next_stages_refuse_validation_has_told(everything):
    """The other way round, for every planted damage."""
    for planted in everything.planted.values():
        for case in planted.cases:
            try:
                scan = read_scan([everything.root / case.images[0]], 1).load()
                read_labels(everything.root / case.label, on=scan)
            except DataError:
                assert any(f.severity == "error" for f in everything.told[case.id]), planted.damage


def test_the_documentation_says_what_cannot_be_seen_and_lists_the_rules(repository):
    text = (repository / "docs" / "validation.md").read_text(encoding="utf-8")
    assert "## What it cannot see" in text
    for rule in {rule for kind in DAMAGES.values() for rule in kind.rules}:
        assert f"- rule: {rule}\n" in SUITE.read_text(encoding="utf-8")


def test_no_real_case_is_accused(hippocampus_archive, tmp_path):
    root = find_root(extract(hippocampus_archive, tmp_path / "real"))
    index = index_dataset(root, DownloadConfig(source=str(root)), source="Task04_Hippocampus")
    assert len(index.cases) == 260
    assert validated(root, index) == ()
