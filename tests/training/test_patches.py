"""Drawing patches: which case, where, how deep."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.config import PreprocessConfig
from distilldsm.core.errors import DataError
from distilldsm.data.preprocess import preprocess_dataset
from distilldsm.training.patches import PatchSampler, _cut, open_array
from tests.data.volumes import write_dataset


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    output = tmp_path_factory.mktemp("preprocessed")
    index = write_dataset(root, cases=7)
    preprocess_dataset(root, index, PreprocessConfig(folds=3, workers=1), output)
    return output, [c.id for c in index.cases]


def sampler(preprocessed, **changes) -> PatchSampler:
    options = {
        "patch_size": (8, 16, 16),
        "stride": (1, 16, 16),
        "foreground_oversampling": 0.5,
        "samples_per_case": 1,
        "batch_size": 2,
        "seed": 0,
    }
    return PatchSampler(preprocessed[0], preprocessed[1], **{**options, **changes})


def test_batches_depend_on_epoch_and_step_only(preprocessed):
    one, two = sampler(preprocessed), sampler(preprocessed)
    two.batch(5, 0)
    for a, b in zip(one.batch(3, 1), two.batch(3, 1), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(one.batch(3, 1)[0], one.batch(4, 1)[0])


def test_shares_are_cut_like_labels(preprocessed, tmp_path):
    root, cases = preprocessed
    shutil.copytree(root, tmp_path / "shares_too")
    (tmp_path / "shares_too" / "shares").mkdir()
    for case in cases:
        label = np.load(root / "labels" / f"{case}.npy")
        np.save(
            tmp_path / "shares_too" / "shares" / f"{case}.npy", np.stack([label == k for k in (1, 2)]) * np.uint8(255)
        )
    images, labels, size = sampler(preprocessed).batch(3, 1)
    of_shares = sampler((tmp_path / "shares_too", cases)).batch(3, 1)
    assert np.array_equal(of_shares[0], images)
    assert np.array_equal(of_shares[1], np.stack([labels == k for k in (1, 2)], axis=1) * np.uint8(255))
    assert of_shares[2] == size


def test_an_epoch_uses_every_case_once(preprocessed):
    s = sampler(preprocessed, batch_size=1)
    assert s.steps_per_epoch == 7
    assert sorted(s.epoch_order(0)) == list(range(7))
    assert list(s.epoch_order(0)) != list(s.epoch_order(1))
    assert sampler(preprocessed, batch_size=20).steps_per_epoch == 1
    assert len(sampler(preprocessed, batch_size=20).epoch_order(0)) == 20


def test_processes_share_a_batch(preprocessed):
    s = sampler(preprocessed, batch_size=4)
    whole = s.batch(0, 0)[0]
    parts = [s.batch(0, 0, rank=r, world=2)[0] for r in range(2)]
    assert np.array_equal(whole[0::2], parts[0])
    assert np.array_equal(whole[1::2], parts[1])


def test_depth_is_never_made_up(preprocessed):
    """A batch is as deep as its shallowest case, so that no slice of zeros is learnt from."""
    s = sampler(preprocessed, patch_size=(99, 16, 16), batch_size=7)
    _, _, size = s.batch(0, 0)
    assert size[0] == s.depths.min()


def test_foreground_oversampling_hits_foreground(preprocessed):
    always = sampler(preprocessed, patch_size=(2, 16, 16), foreground_oversampling=1.0, batch_size=7, margin=1.0)
    _, labels, size = always.batch(0, 0)
    assert labels.shape[1:] == size
    assert all((label > 0).any() for label in labels)


@pytest.mark.parametrize(
    ("cases", "samples", "batch", "steps"), [(7, 3, 2, 10), (7, 3, 21, 1), (7, 3, 22, 1), (6, 1, 3, 2)]
)
def test_every_case_as_often_as_asked_for(preprocessed, cases, samples, batch, steps):
    made = PatchSampler(
        preprocessed[0], preprocessed[1][:cases], patch_size=(7, 17, 15), stride=(4, 16, 8), foreground_oversampling=0,
        samples_per_case=samples, batch_size=batch, seed=0,
    )  # fmt: skip
    assert made.patch_size == (8, 32, 16)
    assert made.margin == 1.2
    assert made.steps_per_epoch == steps
    order = made.epoch_order(0)
    assert len(order) == steps * batch
    counts = np.bincount(order, minlength=cases)
    assert counts.max() <= samples + max(0, steps * batch - cases * samples)


def test_patches_of_one_step_are_those_of_its_positions(preprocessed):
    """Each is cut from its own case, with its margin, as deep as the shallowest of the whole batch allows."""
    made = sampler(preprocessed, patch_size=(12, 16, 16), stride=(4, 16, 16), batch_size=3, margin=1.25)
    for step in range(2):
        cases = made.epoch_order(1)[3 * step : 3 * step + 3]
        depth = min(12, min(made.depths[cases])) // 4 * 4
        images, labels, size = made.batch(1, step)
        assert size == (depth, 16, 16)
        assert images.shape == (3, 1, round(depth * 1.25), 20, 20)
        assert labels.shape == (3, *images.shape[2:])
        for k in range(3):
            stored = np.load(preprocessed[0] / "images" / f"{preprocessed[1][cases[k]]}.npy")
            assert set(np.unique(images[k])) <= {*np.unique(stored), 0}
            assert np.isin(images[k], stored).mean() > 0.4
    deep = sampler(preprocessed, patch_size=(64, 16, 16), stride=(64, 16, 16), margin=1.0)
    assert deep.batch(0, 0)[2] == (64, 16, 16)  # one multiple of the stride at least


@pytest.mark.parametrize(
    ("shape", "size", "places"),
    [
        ((9, 4, 5), (4, 4, 8), (range(2, 8), range(2, 3), range(1, 5))),
        ((3, 6, 5), (3, 3, 2), (range(1, 2), range(1, 5), range(1, 5))),
        ((2, 1, 7), (5, 4, 7), (range(-1, 3), range(-1, 3), range(3, 4))),
    ],
)
def test_centres_are_all_that_keep_the_patch_inside(preprocessed, shape, size, places):
    """Where the volume is the smaller one, it lies anywhere inside the patch."""
    made, rng = sampler(preprocessed, foreground_oversampling=0.0), np.random.default_rng(0)
    drawn = np.array([made._centre("none", shape, size, rng) for _ in range(400)])
    for axis in range(3):
        assert sorted(set(drawn[:, axis])) == list(places[axis])


def test_centres_on_foreground_are_of_each_class_alike(preprocessed, tmp_path):
    (tmp_path / "locations").mkdir()
    rows = [(1, 0, 5, 5)] + [(3, 6, 5, k) for k in range(9)] + [(1, 0, 5, 5)]
    np.save(tmp_path / "locations" / "a.npy", np.array(rows, dtype=np.int32))
    made, rng = sampler(preprocessed, foreground_oversampling=0.75), np.random.default_rng(0)
    made.root = tmp_path
    drawn = np.array([made._centre("a", (20, 10, 10), (2, 1, 2), rng) for _ in range(4000)])
    assert (drawn[:, 0] <= 1).mean() == pytest.approx(0.75 / 2 + 0.25 / 19, abs=0.03)  # clipped into the volume
    assert (drawn[:, 0] == 6).mean() == pytest.approx(0.75 / 2 + 0.25 / 19, abs=0.03)
    assert set(drawn[drawn[:, 0] == 6, 2]) == set(range(1, 10))
    np.save(tmp_path / "locations" / "a.npy", np.zeros((0, 4), dtype=np.int32))
    assert len({made._centre("a", (20, 10, 10), (2, 1, 2), rng)[0] for _ in range(400)}) == 19


@settings(deadline=None, max_examples=40)
@given(shape=st.tuples(*[st.integers(1, 6)] * 3), size=st.tuples(*[st.integers(1, 7)] * 3), data=st.data())
def test_cutting_equals_indexing_a_padded_volume(shape, size, data):
    array = np.random.default_rng(0).integers(1, 100, (2, *shape))
    centre = [data.draw(st.integers(0, n)) for n in shape]
    padded = np.pad(array, [(0, 0)] + [(10, 10)] * 3)
    window = tuple(slice(10 + c - s // 2, 10 + c - s // 2 + s) for c, s in zip(centre, size, strict=True))
    assert np.array_equal(_cut(array, centre, size), padded[(slice(None), *window)])


def test_missing_array_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.npy"):
        open_array(tmp_path / "gone.npy")
    np.savez(tmp_path / "several.npy.npz", a=np.zeros(2))
    with pytest.raises(DataError, match=r"a \.npz archive"):
        open_array((tmp_path / "several.npy.npz").rename(tmp_path / "several.npy"))
