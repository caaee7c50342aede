"""Fingerprint, plan, splits, arrays: from volumes on disk to what training reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.components.preprocess import run
from distilldsm.config import PreprocessConfig
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.hashes import file_hashes
from distilldsm.data import fingerprint, preprocess
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.data.fingerprint import fingerprint_case, summarise
from distilldsm.data.plan import Plan, make_plan
from distilldsm.data.preprocess import foreground_locations, preprocess_dataset
from tests.data.test_plan import INDEX, case_fingerprint, index_of
from tests.data.volumes import affine, write_case, write_dataset


def test_fingerprint_in_ras_order(tmp_path: Path):
    case = write_case(tmp_path, "a", shape=(6, 8, 10), matrix=affine("SLA", (3.0, 1.0, 2.0)))
    index = DatasetIndex(
        name="x",
        channels=(Channel(name="c", modality="MRI"),),
        labels={"background": 0, "shell": 1, "core": 2},
        cases=(case,),
    )
    found = fingerprint_case(tmp_path, case, index)
    assert found.shape == (8, 10, 6)
    assert found.spacing_mm == pytest.approx((1.0, 2.0, 3.0))
    label = np.asarray(nib.load(tmp_path / case.label).dataobj)
    assert found.label_volumes_ml["core"] == pytest.approx((label == 2).sum() * 6 / 1000)


def test_the_median_shape_is_that_of_the_cropped_arrays(tmp_path: Path):
    index = write_dataset(tmp_path, cases=5, shape=(12, 20, 16))
    for written in index.cases:
        image = nib.load(tmp_path / written.images[0])
        data = image.get_fdata(dtype=np.float32)
        data[0] = data[:, -3:] = 0
        nib.save(nib.Nifti1Image(data, image.affine), tmp_path / written.images[0])
    made = preprocess_dataset(tmp_path, index, PreprocessConfig(workers=1), tmp_path / "out")
    arrays = [np.load(p) for p in sorted((tmp_path / "out" / "images").iterdir())]
    assert made.median_shape == tuple(np.median([a.shape[1:] for a in arrays], axis=0))


def test_the_foreground_is_sampled_evenly(tmp_path: Path, monkeypatch):
    case = write_case(tmp_path, "a")
    index = replace(INDEX, labels={"background": 0, "shell": 1, "core": 2}, cases=(case,))
    image, label = (np.asarray(nib.load(tmp_path / p).dataobj) for p in (case.images[0], case.label))
    for limit in (20_000, 100):
        monkeypatch.setattr(fingerprint, "SAMPLES_PER_CASE", limit)
        inside = image[label > 0].astype(np.float64)
        sampled = inside[:: max(1, len(inside) // limit)]
        found = fingerprint_case(tmp_path, case, index)
        assert found.foreground_mean[0] == pytest.approx(sampled.mean())
        assert found.foreground_sd[0] == pytest.approx(sampled.std())
        assert found.foreground_percentiles[0] == pytest.approx(np.percentile(sampled, (0.5, 5, 50, 95, 99.5)))
        assert found.has_foreground


def test_without_labels_the_foreground_is_what_is_not_zero(tmp_path: Path):
    """In any channel; and where all is zero, so are the intensities."""
    case = write_case(tmp_path, "a", shape=(6, 8, 10), channels=2, matrix=affine("LSA", (1.0, 2.0, 3.0)))
    index = replace(INDEX, labels={"background": 0, "shell": 1, "core": 2}, cases=(case,), channels=2 * INDEX.channels)
    data = [np.zeros((6, 8, 10), dtype=np.float32) for _ in range(2)]
    data[0][1, 2:5, 3], data[1][2, 4, 3:9] = 10, 20
    for filled in (1, 0):
        for path, channel in zip(case.images, data, strict=True):
            nib.save(nib.Nifti1Image(channel * filled, affine("LSA", (1.0, 2.0, 3.0))), tmp_path / path)
        nib.save(nib.Nifti1Image(np.zeros((6, 8, 10), np.uint8), affine("LSA", (1.0, 2.0, 3.0))), tmp_path / case.label)
        found = fingerprint_case(tmp_path, case, index)
        assert found.nonzero_fraction == pytest.approx(filled * 9 / 36)
        assert found.nonzero_shape == ((2, 6, 3) if filled else (6, 10, 8))
        assert found.foreground_mean == pytest.approx((filled * 30 / 9, filled * 120 / 9))
        assert not found.has_foreground


def test_a_summary_of_three_cases():
    cases = [
        case_fingerprint(
            case=name, shape=(n, 10, 5), nonzero_fraction=n / 100, foreground_mean=(m,), foreground_sd=(sd,),
            foreground_percentiles=((0.0, 1.0, m, 9.0, 2 * m),), label_volumes_ml={"one": ml},
        )
        for name, n, m, sd, ml in (("a", 30, 10.0, 3.0, 1.0), ("b", 10, 20.0, 4.0, 0.0), ("c", 50, 60.0, 0.0, 3.0))
    ]  # fmt: skip
    found = summarise(cases, INDEX)
    assert found["cases"] == 3
    assert found["shape"] == {"min": [10, 10, 5], "median": [30, 10, 5], "max": [50, 10, 5]}
    assert found["nonzero_fraction"] == {"min": [0.1], "median": [0.3], "max": [0.5]}
    assert found["label_volumes_ml"] == {"one": {"min": [0], "median": [1], "max": [3]}}
    assert found["foreground_intensity"] == {
        "c": {"mean": 35.0, "sd": pytest.approx(4.5**0.5), "percentiles": [0, 1, 35, 9, 70]}
    }
    assert found["per_case"] == cases
    assert found["spacing_mm"]["median"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("voxels", "channels", "memory", "requested", "workers"),
    [
        (10_000_000, 1, 1.9, 8, 2),  # 40 bytes a voxel, of one channel and one more, and 0.15 GB: 0.95 GB each
        (10_000_000, 1, 1.89, 8, 1),
        (10_000_000, 3, 3.5, 8, 2),
        (0, 1, 0.6, 8, 4),
        (0, 1, 100, 3, 3),
        (0, 1, 100, 8, 6),
        (10_000_000, 1, 0.1, 8, 1),
    ],
)
def test_as_many_workers_as_the_memory_holds(voxels, channels, memory, requested, workers):
    index = replace(index_of(list("abcdef")), channels=INDEX.channels * channels)
    config = PreprocessConfig(memory_gb=memory, workers=requested)
    assert preprocess._workers(index, config, voxels) == workers


def test_the_largest_of_some_fifty_scans_is_found(tmp_path: Path):
    shapes = {f"c{k:03d}": (4, 5, 6 + (k == 98)) for k in range(120)}
    for name, shape in shapes.items():
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), tmp_path / f"{name}.nii")
    cases = tuple(Case(id=n, patient=n, images=(f"{n}.nii",), label="l") for n in shapes)
    (tmp_path / "c000.nii").write_bytes(b"damaged")
    for kept, largest in ((120, 140), (97, 120), (99, 140)):
        assert preprocess._largest_scan(tmp_path, replace(INDEX, cases=cases[:kept])) == largest


@pytest.mark.parametrize("bad", [10, 11])
def test_ten_problems_are_shown_and_the_others_counted(bad):
    def fail(number, case):
        if number < bad:
            raise DataError(f"is bad in way {number}")

    tasks = [(k, case) for k, case in enumerate(index_of(["p"] * 12).cases)][::-1]
    with pytest.raises(DataError) as caught:
        preprocess.run_cases("x", fail, tasks, 1)
    told = str(caught.value)
    assert f"{bad} case(s) failed in x" in told
    assert told.count("- case") == 10
    assert ("(and 1 more)" in told) == (bad == 11)
    assert "p_9" in told or bad == 11
    shown = [line.split(":")[0] for line in told.splitlines() if line.startswith("- case")]
    assert shown == sorted(shown)
    preprocess.run_cases("x", fail, tasks[:1], 1)


@pytest.mark.parametrize("value", [65_000.0, -65_000.0, 65_100.0, -65_100.0])
def test_what_half_precision_holds_is_stored(tmp_path: Path, value):
    """Prediction would not clip the others: the network would see another range than it was trained with."""
    case = write_case(tmp_path, "a", shape=(6, 8, 10))
    image = np.zeros((6, 8, 10), dtype=np.float32)
    image[2, 3, 4] = value
    nib.save(nib.Nifti1Image(image, affine()), tmp_path / case.images[0])
    index = replace(INDEX, labels={"background": 0, "shell": 1, "core": 2}, cases=(case,))
    plan = make_plan(index, [fingerprint_case(tmp_path, case, index)], PreprocessConfig(normalisation="none"))
    for folder in ("images", "labels", "locations", "cases"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    if abs(value) > 65_000:
        with pytest.raises(DataError, match=r"too large(.|\n)*seen: 6.51e\+04 after"):
            preprocess._preprocess(tmp_path, case, index, plan, False, tmp_path / "out")
    else:
        preprocess._preprocess(tmp_path, case, index, plan, False, tmp_path / "out")
        assert np.load(tmp_path / "out/images/a.npy").sum() == np.float16(value)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    output = tmp_path_factory.mktemp("preprocessed")
    index = write_dataset(root, cases=6, channels=2)
    plan = preprocess_dataset(root, index, PreprocessConfig(folds=3, workers=1), output)
    return root, index, output, plan


def test_arrays_for_training(prepared):
    _, index, output, plan = prepared
    assert Plan.load(output / "plan.json") == plan
    assert plan.depth_axis == "x"
    assert not (output / ".fingerprint").exists()
    for case in index.cases:
        image = np.load(output / "images" / f"{case.id}.npy", mmap_mode="r")
        label = np.load(output / "labels" / f"{case.id}.npy", mmap_mode="r")
        assert image.dtype == np.float16
        assert image.shape == (2, *label.shape)
        assert set(np.unique(label)) == {0, 1, 2}
        # Bright structures stay on their labels through every orientation.
        assert image[0][label == 2].mean() > image[0][label == 1].mean() > image[0][label == 0].mean()
        locations = np.load(output / "locations" / f"{case.id}.npy")
        assert all(label[tuple(row[1:])] == row[0] for row in locations)
    assert len(read_json(output / "splits.json")["folds"]) == 3
    assert read_json(output / "fingerprint.json")["cases"] == 6
    assert not (output / "shares").exists()


def test_resampled_cases_keep_the_shares_of_their_classes(prepared, tmp_path: Path, monkeypatch):
    root, index, _, plan = prepared
    coarser = tuple(2 * mm for mm in plan.target_spacing_mm)
    settings = PreprocessConfig(folds=3, workers=1, target_spacing_mm=coarser)
    preprocess_dataset(root, index, settings, tmp_path / "out")
    for case in index.cases:
        label = np.load(tmp_path / "out" / "labels" / f"{case.id}.npy")
        shares = np.load(tmp_path / "out" / "shares" / f"{case.id}.npy").astype(int)
        assert shares.shape == (2, *label.shape)
        every = np.concatenate([255 - shares.sum(axis=0, keepdims=True), shares])
        assert ((every > 0) & (every < 255)).any()
        assert (np.take_along_axis(every, label[None], 0)[0] >= every.max(axis=0) - 1).all()
    monkeypatch.setattr(preprocess, "SHARES_LIMIT", 2)
    preprocess_dataset(root, index, settings, tmp_path / "many")
    assert not (tmp_path / "many" / "shares").exists()


def test_workers_and_resuming_do_not_change_a_byte(prepared, tmp_path: Path, monkeypatch):
    root, index, output, _ = prepared
    config = PreprocessConfig(folds=3, workers=2)
    target = tmp_path / "again"
    import distilldsm.data.preprocess as module

    original = module._preprocess
    calls = []

    def dies_after_three(*task):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(task)
        original(*task)

    monkeypatch.setattr(module, "_preprocess", dies_after_three)
    with pytest.raises(KeyboardInterrupt):
        preprocess_dataset(root, index, PreprocessConfig(folds=3, workers=1), target)
    monkeypatch.setattr(module, "_preprocess", original)
    assert len(list((target / "cases").glob("*.json"))) == 3
    preprocess_dataset(root, index, config, target)
    assert file_hashes(target) == file_hashes(output)


def test_all_damaged_cases_are_named(tmp_path: Path):
    index = write_dataset(tmp_path, cases=5)
    (tmp_path / index.cases[1].images[0]).write_bytes(b"no nifti")
    label = nib.load(tmp_path / index.cases[3].label)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj) * 4, label.affine), tmp_path / index.cases[3].label)
    with pytest.raises(DataError) as caught:
        preprocess_dataset(tmp_path, index, PreprocessConfig(workers=1), tmp_path / "out")
    message = str(caught.value)
    assert "2 case(s) failed" in message
    assert "case_01" in message
    assert "case_03" in message
    assert "does not declare" in message


def test_a_plan_of_ones_own_is_used_and_checked(prepared, tmp_path: Path):
    root, index, _, _ = prepared
    mine = read_json(prepared[2] / "plan.json")
    mine["patch_size"] = [4, 32, 32]
    write_json(tmp_path / "mine.json", mine)
    config = PreprocessConfig(folds=3, workers=1, plan=str(tmp_path / "mine.json"))
    assert preprocess_dataset(root, index, config, tmp_path / "out").patch_size == (4, 32, 32)
    other = [
        {"class_values": [0, 1, 7]},
        {"class_names": [mine["class_names"][k] for k in (0, 2, 1)]},
        {"channels": mine["channels"][::-1]},
    ]
    for changes in other:
        write_json(tmp_path / "mine.json", mine | changes)
        with pytest.raises(ConfigError, match="another data set"):
            preprocess_dataset(root, index, config, tmp_path / "out2")
    write_json(tmp_path / "mine.json", mine)
    with pytest.raises(ConfigError, match="regions differ from"):
        preprocess_dataset(
            root, index, replace(config, regions={"all": ("shell", "core"), "core": ("core",)}), tmp_path / "out2"
        )
    mine["patch"] = 1
    write_json(tmp_path / "mine.json", mine)
    with pytest.raises(ConfigError, match="unknown parameter 'patch'"):
        preprocess_dataset(root, index, config, tmp_path / "out3")


def test_stage_uses_only_accepted_cases_and_leaves_the_input(tmp_path: Path):
    index = write_dataset(tmp_path / "raw", cases=6)
    accepted = [c.id for c in index.cases[:5]]
    write_json(tmp_path / "accepted.json", {"accepted": accepted})
    before = file_hashes(tmp_path / "raw")
    run(
        PreprocessConfig(workers=1),
        {"dataset": tmp_path / "raw", "validation": tmp_path},
        {"preprocessed": tmp_path / "out"},
    )
    assert sorted(p.stem for p in (tmp_path / "out" / "images").iterdir()) == accepted
    assert file_hashes(tmp_path / "raw") == before
    assert read_json(tmp_path / "out" / "manifest.json")["stage"] == "preprocess"


def test_command_line_reports_what_is_missing(tmp_path: Path, capsys):
    (tmp_path / "params.yaml").write_text("preprocess: {folds: 2}")
    code = main(
        [
            "preprocess",
            "--params",
            str(tmp_path / "params.yaml"),
            "--dataset",
            str(tmp_path),
            "--validation",
            str(tmp_path),
        ]
    )
    assert code == 1
    assert "accepted.json: is missing" in capsys.readouterr().err


def test_foreground_locations_are_bounded_and_right():
    label = np.zeros((20, 30, 40), dtype=np.uint8)
    label[2:18] = 1
    label[0, 0, 0] = 2
    rows = foreground_locations(label, 3)
    assert (rows[:, 0] == 1).sum() == 2000
    every = np.argwhere(label == 1)
    spread = [int(k * (len(every) - 1) / 1999) for k in range(2000)]
    assert np.abs(rows[:2000, 1:] @ [1200, 40, 1] - every[spread] @ [1200, 40, 1]).max() <= 1
    assert len(foreground_locations(label[:2, :, :1], 3)) == 1
    assert rows[rows[:, 0] == 2].tolist() == [[2, 0, 0, 0]]
    assert all(label[tuple(r[1:])] == r[0] for r in rows)
    assert foreground_locations(np.zeros((2, 2, 2), dtype=np.uint8), 3).shape == (0, 4)
