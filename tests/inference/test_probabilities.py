"""Mirrored views and several networks: averages of what an obvious loop gives, whatever the pieces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.core.errors import ConfigError, DataError
from distilldsm.data.targets import softmax
from distilldsm.inference.postprocess import keep_largest
from distilldsm.inference.predict import Predictor
from distilldsm.inference.probabilities import AXES, Ensemble, Member, mirror_axes, parse_mirror, views
from distilldsm.inference.windows import Pieces
from tests.data.volumes import affine
from tests.inference.engines import HALO, THREE, Function, in_pieces, neighbours, slanted, stored

SUBSETS = st.lists(st.sampled_from(list(AXES)), unique=True).map(tuple)
SLANTED = Function(slanted)
OTHER = Function(lambda image: slanted(image)[:, [2, 0, 1]])


def volume(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(deadline=None)
@given(axes=SUBSETS, shape=st.tuples(st.integers(1, 7), st.just(4), st.just(8)), seed=st.integers(0, 5))
def test_the_mean_over_all_flips_as_an_obvious_loop_takes_it(axes, shape, seed):
    piece = volume(1, 2, *shape, seed=seed)
    expected, count = 0.0, 0
    for depth in {False, "depth" in axes}:
        for height in {False, "height" in axes}:
            for width in {False, "width" in axes}:
                seen = piece
                for flip, axis in ((depth, 2), (height, 3), (width, 4)):
                    seen = np.flip(seen, axis) if flip else seen
                found = softmax(slanted(seen)[0])
                for flip, axis in ((depth, 1), (height, 2), (width, 3)):
                    found = np.flip(found, axis) if flip else found
                expected, count = expected + found.astype(np.float64), count + 1
    assert len(views(axes)) == count == 2 ** len(axes)
    found = Ensemble([Member(SLANTED, axes)])(piece)
    np.testing.assert_allclose(found, expected / count, atol=1e-6)
    keep = (slice(0, 1), slice(shape[1] // 2, None), slice(0, shape[2]))
    np.testing.assert_array_equal(Ensemble([Member(SLANTED, axes)])(piece, keep), found[:, *keep])


def test_a_network_that_sees_no_side_gives_the_same_probabilities():
    symmetric = Function(lambda image: np.concatenate([image, np.abs(image), image**2], axis=1), stride=(1, 1, 1))
    piece = volume(1, 1, 5, 6, 7)
    plain = Ensemble([Member(symmetric)])(piece)
    for axis in AXES:  # two equal numbers have themselves as mean; eight only but for rounding
        np.testing.assert_array_equal(Ensemble([Member(symmetric, (axis,))])(piece), plain)
    np.testing.assert_allclose(Ensemble([Member(symmetric, tuple(AXES))])(piece), plain, rtol=1e-6)


@pytest.mark.parametrize("axes", [(), ("depth",), ("height", "width")])
def test_a_model_twice_is_the_model_to_the_last_bit(axes):
    piece = volume(1, 2, 5, 8, 8)
    one, two = Member(SLANTED, axes), Member(OTHER)
    np.testing.assert_array_equal(Ensemble([one, one])(piece), Ensemble([one])(piece))
    both = (Ensemble([one])(piece).astype(np.float64) + Ensemble([two])(piece)) / 2
    np.testing.assert_allclose(Ensemble([one, two])(piece), both, atol=1e-6)
    assert np.abs(both - Ensemble([one])(piece)).max() > 0.1


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
def test_pieces_and_the_whole_give_the_same_mask(axes, others, several, shape, window, coarse, largest, seed):
    data = volume(1, *shape, seed=seed) * np.random.default_rng(seed).choice([0, 1], size=(1, *shape), p=(0.4, 0.6))
    plan, scan = replace(THREE, coarse_slices=coarse), stored(data.astype(np.float32), affine("LPS"))
    network = Ensemble([Member(SLANTED, axes), *([Member(OTHER, others)] if several else [])])
    kept = {"seven": (7,), "three": (3,)} if largest else {}
    expected = in_pieces(network, scan, plan, Pieces(window=1000)).mask
    for values in kept.values():
        keep_largest(expected, values)
    predictor = Predictor(network, plan, max_voxels=window * 16 * 16, keep_largest=kept)
    found = predictor.predict(scan)
    np.testing.assert_array_equal(found.mask, expected)
    assert found.volumes_ml["a"] == pytest.approx((expected == 7).sum() / 1000, abs=1e-4)


def test_a_flip_along_the_depth_takes_the_halo_with_it():
    engine = Function(slanted)
    network = Ensemble([Member(engine, ("depth",))])
    scan = stored(volume(1, 4, 4, 40), affine())
    plan = replace(THREE, target_spacing_mm=(1.0, 1.0, 1.0))

    def maps(window: int) -> np.ndarray:
        found = np.zeros((4, 4, 40, 3), dtype=np.float32)
        in_pieces(network, scan, plan, Pieces(window=window), probabilities=found)
        return found

    whole = maps(1000)
    np.testing.assert_array_equal(maps(7), whole)
    engine.depth_halo = HALO - 1
    assert np.abs(maps(7) - whole).max() > 1e-3, "a slice at the halo's end takes part"


def test_tiles_are_mirrored_too():
    network = Ensemble([Member(Function(neighbours), ("depth",)), Member(Function(neighbours))])
    scan, plan = stored(volume(1, 20, 22, 12), affine()), replace(THREE, target_spacing_mm=(1.0, 1.0, 1.0))
    whole = in_pieces(network, scan, plan, Pieces(window=12)).mask
    tiles = in_pieces(network, scan, plan, Pieces(window=12, tile=(8, 12), exact=False))
    assert not tiles.exact
    assert (tiles.mask != whole).mean() < 0.01, "this network looks at single voxels in plane"


def test_networks_of_an_ensemble_give_their_memory_back_in_turn():
    log = []

    class Logged(Function):
        def __init__(self, name: str, **options) -> None:
            super().__init__(lambda image: log.append(name) or slanted(image), **options)
            self.name = name

        def release(self) -> None:
            log.append(f"{self.name} released")

    one, two = Logged("one", depth_halo=1), Logged("two", depth_halo=3)
    piece = volume(1, 1, 2, 4, 4)
    Ensemble([Member(one, ("depth",))])(piece)
    assert log == ["one", "one"]
    log.clear()
    both = Ensemble([Member(one, ("depth",)), Member(two)])
    both(piece)
    assert log == ["one", "one", "one released", "two", "two released"]
    log.clear()
    both.release()
    assert log == ["one released", "two released"]
    assert both.depth_halo == 3, "the longest"
    assert Ensemble([Member(one), Member(Logged("x", depth_halo=None))]).depth_halo is None


def test_axes_are_read_and_refused():
    assert parse_mirror(None) == ()
    assert parse_mirror("trained") == "trained"
    assert parse_mirror("width,depth") == ("depth", "width")
    for wrong in ("", "up", "depth,", "depth,depth", "export/fold0"):
        with pytest.raises(ConfigError, match="does not name axes"):
            parse_mirror(wrong)
    assert mirror_axes("trained", ["height"], "model") == ("height",)
    assert mirror_axes(("depth",), [], "model") == ("depth",)
    assert mirror_axes((), [], "model") == ()
    with pytest.raises(DataError, match=r"models/fold0: was not trained with mirroring"):
        mirror_axes("trained", [], "models/fold0")
