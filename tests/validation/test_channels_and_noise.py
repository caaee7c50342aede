"""Channels that are copies or not declared, and labels that cannot be seen: warnings of the shipped suite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.config import DownloadConfig
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.layouts import index_dataset
from distilldsm.validation.case_table import CaseTable, build_case_table, table_columns
from distilldsm.validation.content_measures import sampled, separation
from distilldsm.validation.expectations import check_table, load_suite
from tests.data.volumes import write_dataset

RULES = ("channels_all_used", "channels_differ", "labels_can_be_seen")


def findings(root: Path, index: DatasetIndex) -> tuple[CaseTable, dict[str, list[tuple[str | None, str]]]]:
    """The table, and by rule the case and what was seen; only of the rules of this file, which warn."""
    table = build_case_table(root, index)
    found: dict[str, list[tuple[str | None, str]]] = {}
    for one in check_table(table, load_suite("conf/expectations.yaml", table_columns(index), {})):
        if one.rule in RULES:
            assert one.severity == "warning"
            found.setdefault(one.rule, []).append((one.case, one.seen))
    return table, found


def test_identical_channels_are_found(tmp_path):
    index = write_dataset(tmp_path, 3, channels=2)
    assert findings(tmp_path, index)[1] == {}
    images = [tmp_path / name for name in index.cases[1].images]
    shutil.copy(images[0], images[1])
    _, found = findings(tmp_path, index)
    assert found == {"channels_differ": [(index.cases[1].id, "T1 holds the same voxels as T0")]}
    # The same values in other places are another image.
    image = nib.load(images[0])
    nib.save(nib.Nifti1Image(np.array(image.dataobj)[::-1], image.affine), images[1])
    assert findings(tmp_path, index)[1] == {}


@pytest.mark.parametrize("ending", ["0001", "T1CE"])
def test_files_of_channels_that_are_not_declared_are_found(tmp_path, ending):
    index = write_dataset(tmp_path / "made", 3)
    own = "0000" if ending == "0001" else "flair"
    for case in index.cases:
        for folder, name, source in (
            ("imagesTr", f"{case.id}_{own}", case.images[0]),
            ("labelsTr", case.id, case.label),
        ):
            (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "made" / source, tmp_path / "in" / folder / f"{name}.nii.gz")
    surplus = f"imagesTr/{index.cases[1].id}_{ending}.nii.gz"
    shutil.copy(tmp_path / "made" / index.cases[1].images[0], tmp_path / "in" / surplus)
    if ending == "0001":
        description = {"channel_names": {"0": "T1"}, "labels": dict(index.labels), "numTraining": 3}
        (tmp_path / "in" / "dataset.json").write_text(json.dumps(description))
        config = DownloadConfig(source="x")
    else:
        pattern = {"images": ["imagesTr/{case}_flair.nii.gz"], "label": "labelsTr/{case}.nii.gz"}
        config = pattern_config(pattern, index)
    read = index_dataset(tmp_path / "in", config, source="x")
    assert [case.surplus for case in read.cases] == [(), (surplus,), ()]
    assert findings(tmp_path / "in", read)[1] == {"channels_all_used": [(index.cases[1].id, f"not used: {surplus}")]}


def pattern_config(pattern: dict, index: DatasetIndex) -> DownloadConfig:
    from distilldsm.core.mapping import from_mapping

    described = {**pattern, "channels": {"FLAIR": "MRI"}, "labels": dict(index.labels)}
    return from_mapping(DownloadConfig, {"source": "x", "layout": "pattern", "pattern": described})


def test_labels_on_noise_are_a_finding_about_the_data_set(tmp_path):
    index = write_dataset(tmp_path, 5)
    rng = np.random.default_rng(0)
    for k, case in enumerate(index.cases):
        table, found = findings(tmp_path, index)
        assert set(found) == ({"labels_can_be_seen"} if k > 2 else set()), k
        path = tmp_path / case.images[0]
        image = nib.load(path)
        nib.save(nib.Nifti1Image(rng.normal(100, 20, image.shape).astype(np.float32), image.affine), path)
    table, found = findings(tmp_path, index)
    assert found["labels_can_be_seen"] == [(None, "5 of 5 cases: area 0.45 to 0.55")]
    assert all(0.45 < row.values["label_auc"] < 0.55 for row in table.rows)


def test_the_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    inside = rng.random(700) < 0.4
    values = np.round(rng.normal(size=700) + 0.5 * inside, 1)
    pairs = values[inside][:, None] - values[~inside][None]
    expected = ((pairs > 0).sum() + 0.5 * (pairs == 0).sum()) / pairs.size
    assert separation([values], inside) == pytest.approx(expected)
    assert separation([rng.normal(size=700), -values], inside) == pytest.approx(1 - expected), "the best channel"
    assert separation([values], np.arange(700) < 5) is None
    assert separation([values[1:]], inside) is None


def test_samples_are_evenly_spread(monkeypatch):
    monkeypatch.setattr("distilldsm.validation.content_measures.SAMPLES", 1000)
    places = np.arange(20 * 30 * 40).reshape(20, 30, 40)
    kept = np.unravel_index(sampled(places), places.shape)
    assert len(kept[0]) <= 1000
    for axis, size in enumerate(places.shape):
        assert len(np.unique(kept[axis])) == size, "every line of every axis"
