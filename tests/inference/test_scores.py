"""Mirrored views and several networks: averages of what an obvious loop gives, in memory and in pieces alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.core.errors import ConfigError, DataError
from distilldsm.data.targets import softmax
from distilldsm.inference.predict import NetworkGeometry, Predictor
from distilldsm.inference.scores import AXES, Member, Scorer, mirror_axes, parse_mirror, views
from distilldsm.inference.windows import predict_scores
from distilldsm.io import Volume
from tests.data.volumes import affine
from tests.inference.test_predict import PLAN
from tests.inference.test_streaming import HALO, in_pieces, neighbours, stored

THREE = replace(PLAN, class_names=("background", "a", "b"), class_values=(0, 7, 3), target_spacing_mm=(1.3, 1.0, 0.8))
SUBSETS = st.lists(st.sampled_from(list(AXES)), unique=True).map(tuple)


def slanted(image: np.ndarray) -> np.ndarray:
    """Like `neighbours`, and different along every axis, so that every flip shows."""
    logits = neighbours(image)
    _, _, _, height, width = image.shape
    logits[:, 1] += np.linspace(0, 0.5, height, dtype=np.float32)[:, None]
    logits[:, 2] += np.linspace(0, 0.7, width, dtype=np.float32)
    return logits


def other(image: np.ndarray) -> np.ndarray:
    return slanted(image)[:, [2, 0, 1]]


def volume(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(deadline=None)
@given(axes=SUBSETS, shape=st.tuples(*[st.integers(1, 7)] * 3), seed=st.integers(0, 5))
def test_the_mean_over_all_flips_as_an_obvious_loop_takes_it(axes, shape, seed):
    piece = volume(1, 2, *shape, seed=seed)
    expected, count = 0.0, 0
    for depth in {False, "depth" in axes}:
        for height in {False, "height" in axes}:
            for width in {False, "width" in axes}:
                seen = piece
                for flip, axis in ((depth, 2), (height, 3), (width, 4)):
                    seen = np.flip(seen, axis) if flip else seen
                scores = softmax(slanted(seen)[0])
                for flip, axis in ((depth, 1), (height, 2), (width, 3)):
                    scores = np.flip(scores, axis) if flip else scores
                expected, count = expected + scores.astype(np.float64), count + 1
    assert len(views(axes)) == count == 2 ** len(axes)
    found = Scorer([Member(slanted, axes)])(piece)
    np.testing.assert_allclose(found, expected / count, atol=1e-6)
    keep = (slice(0, 1), slice(shape[1] // 2, None), slice(0, shape[2]))
    np.testing.assert_array_equal(Scorer([Member(slanted, axes)])(piece, keep), found[:, *keep])


def test_a_network_that_sees_no_side_gives_the_same_scores():
    def symmetric(image):
        return np.concatenate([image, np.abs(image), image**2], axis=1)

    piece = volume(1, 1, 5, 6, 7)
    plain = Scorer([Member(symmetric)])(piece)
    for axis in AXES:  # two equal numbers have themselves as mean; eight only but for rounding
        np.testing.assert_array_equal(Scorer([Member(symmetric, (axis,))])(piece), plain)
    np.testing.assert_allclose(Scorer([Member(symmetric, tuple(AXES))])(piece), plain, rtol=1e-6)
    # And the mirrored network commutes with flips, whatever the network is.
    mirrored = Scorer([Member(slanted, ("depth", "width"))])
    for axis in (2, 4):
        np.testing.assert_allclose(
            mirrored(np.flip(piece, axis)), np.flip(mirrored(piece), axis - 1), rtol=0, atol=1e-6
        )
    assert np.abs(mirrored(np.flip(piece, 3)) - np.flip(mirrored(piece), 2)).max() > 1e-3


@pytest.mark.parametrize("axes", [(), ("depth",), ("height", "width")])
def test_a_model_twice_is_the_model_to_the_last_bit(axes):
    piece = volume(1, 2, 5, 6, 7)
    one, two = Member(slanted, axes), Member(other)
    np.testing.assert_array_equal(Scorer([one, one])(piece), Scorer([one])(piece))
    both = (Scorer([one])(piece).astype(np.float64) + Scorer([two])(piece)) / 2
    np.testing.assert_allclose(Scorer([one, two])(piece), both, atol=1e-6)
    assert np.abs(both - Scorer([one])(piece)).max() > 0.1


@settings(deadline=None, max_examples=60)
@given(
    axes=SUBSETS,
    others=SUBSETS,
    several=st.booleans(),
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    window=st.integers(2 * HALO + 1, 12),
    coarse=st.booleans(),
    largest=st.booleans(),
    seed=st.integers(0, 9),
)
def test_pieces_and_memory_give_the_same_mask(axes, others, several, shape, window, coarse, largest, seed):
    data = volume(1, *shape, seed=seed) * np.random.default_rng(seed).choice([0, 1], size=(1, *shape), p=(0.4, 0.6))
    plan = replace(THREE, coarse_slices=coarse)
    scorer = Scorer([Member(slanted, axes), *([Member(other, others)] if several else [])])
    geometry = NetworkGeometry(stride=(1, 4, 4), depth_halo=HALO)
    kept = {"seven": (7,), "three": (3,)} if largest else {}
    # In memory too in chunks, of another size than the pieces.
    predictor = Predictor(slanted, plan, geometry, max_voxels=7 * 16 * 16, scorer=scorer, keep_largest=kept)
    expected = predictor.predict(Volume(data.astype(np.float32), affine("LPS"), Path("scan.nii")))
    from distilldsm.inference.postprocess import keep_largest

    found, _ = in_pieces(scorer, stored(data.astype(np.float32), affine("LPS")), plan, window=window)
    for values in kept.values():
        keep_largest(found, values)
    np.testing.assert_array_equal(found, expected)


def test_a_flip_along_the_depth_takes_the_halo_with_it():
    scorer = Scorer([Member(slanted, ("depth",))])
    image = volume(1, 40, 4, 4)
    whole = predict_scores(scorer, image, stride=(1, 4, 4), depth_halo=HALO, max_voxels=10**9)
    chunks = predict_scores(scorer, image, stride=(1, 4, 4), depth_halo=HALO, max_voxels=(3 + 2 * HALO) * 16)
    np.testing.assert_array_equal(chunks, whole)
    short = predict_scores(scorer, image, stride=(1, 4, 4), depth_halo=HALO - 1, max_voxels=(3 + 2 * HALO) * 16)
    assert np.abs(short - whole).max() > 1e-3, "a slice at the halo's end takes part"


def test_tiles_are_mirrored_too():
    scorer = Scorer([Member(neighbours, ("depth",)), Member(neighbours)])
    data = volume(1, 20, 22, 12)
    plan = replace(THREE, target_spacing_mm=(1.0, 1.0, 1.0))
    whole, _ = in_pieces(scorer, stored(data, affine()), plan, window=12)
    tiles, _ = in_pieces(scorer, stored(data, affine()), plan, window=12, tile=(8, 12))
    assert (tiles != whole).mean() < 0.01, "this network looks at single voxels in plane"


def test_networks_of_an_ensemble_give_their_memory_back_in_turn():
    log = []

    class Logged:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, image):
            log.append(self.name)
            return slanted(image)

        def release(self) -> None:
            log.append(f"{self.name} released")

    one, two = Logged("one"), Logged("two")
    piece = volume(1, 1, 2, 3, 4)
    Scorer([Member(one, ("depth",))])(piece)
    assert log == ["one", "one"]
    log.clear()
    Scorer([Member(one, ("depth",)), Member(two)])(piece)
    assert log == ["one", "one", "one released", "two", "two released"]
    log.clear()
    Scorer([Member(one), Member(slanted)]).release()
    assert log == ["one released"]


def test_axes_are_read_and_refused():
    assert parse_mirror(None) == ()
    assert parse_mirror("trained") == "trained"
    assert parse_mirror("width,depth") == ("depth", "width")
    for wrong in ("", "up", "depth,", "depth,depth", "export/fold0"):
        with pytest.raises(ConfigError, match="names no axes"):
            parse_mirror(wrong)
    assert mirror_axes("trained", ["height"], "model") == ("height",)
    assert mirror_axes(("depth",), [], "model") == ("depth",)
    assert mirror_axes((), [], "model") == ()
    with pytest.raises(DataError, match=r"models/fold0: was not trained with mirroring"):
        mirror_axes("trained", [], "models/fold0")
