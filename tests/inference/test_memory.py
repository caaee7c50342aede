"""Pieces that fit a budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.core import machine
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.machine import DEFAULT_GB, budget_bytes
from distilldsm.inference import memory
from distilldsm.inference.memory import activation_bytes, plan_pieces


def test_the_default_budget_is_a_number_or_half_of_what_is_free(monkeypatch):
    for free, expected in ((None, DEFAULT_GB * 1e9), (10**12, DEFAULT_GB * 1e9), (2 * 10**9, 10**9)):
        monkeypatch.setattr(machine, "available_memory_bytes", lambda free=free: free)
        assert budget_bytes(None) == expected
    assert budget_bytes(1.5) == 1_500_000_000
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            budget_bytes(wrong)


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 40)),
    halo=st.sampled_from([None, 0, 2, 8]),
    gigabytes=st.floats(0.4, 4),
    held=st.integers(0, 10**9),
    limited=st.booleans(),
)
def test_pieces_stay_within_the_budget(size, halo, gigabytes, held, limited):
    stride = (16, 16, 16) if halo is None else (1, 16, 16)
    padded = [n * 16 if k or halo is None else n for k, n in enumerate(size)]
    budget = int(gigabytes * 1e9)
    try:
        pieces = plan_pieces(
            padded,
            stride=stride,
            depth_halo=halo,
            per_voxel=activation_bytes("unet3d" if halo is None else "distill_dsm", {}, "openvino"),
            channels=1,
            classes=3,
            held_bytes=held,
            budget=budget,
            where="scan.nii",
            limit_voxels=memory.DEFAULT_PIECE_VOXELS if limited else None,
        )
    except DataError:  # not even the smallest tile: the test below
        return
    assert pieces.estimate_bytes <= budget
    assert 1 <= pieces.window <= padded[0]
    assert pieces.window % stride[0] == 0
    if halo is not None and pieces.tile is None:
        assert pieces.exact
        assert pieces.window == padded[0] or pieces.window > 2 * halo
    if pieces.tile is not None:
        assert not pieces.exact
        assert all(0 < t <= n and (t % 16 == 0 or t == n) for t, n in zip(pieces.tile, padded[1:], strict=True))


def plan_of_100_slices(budget: float, *, channels: int = 1, **more) -> memory.Pieces:
    """Of 512 x 512, three classes, 0.1 GB held."""
    return plan_pieces(
        (100, 512, 512),
        stride=(1, 16, 16),
        depth_halo=8,
        per_voxel=235.0,
        channels=channels,
        classes=3,
        held_bytes=10**8,
        budget=int(budget),
        where="scan.nii",
        **more,
    )


def test_averages_and_what_comes_after_are_in_the_estimate():
    def plan(budget: int = 10**12, **more):
        return plan_of_100_slices(budget, channels=2, **more)

    voxels = 100 * 512 * 512
    plain = plan().estimate_bytes
    # Sums of scores, and the piece turned round; one network at a time holds activations.
    assert plan(mirrored=True).estimate_bytes - plain == pytest.approx(4 * (2 + 3) * voxels, abs=1)
    assert plan(averaged=True).estimate_bytes - plain == pytest.approx(4 * 3 * voxels, abs=1)
    assert plan(3 * 10**9, mirrored=True).window < plan(3 * 10**9).window
    assert plan(after_bytes=10**9).estimate_bytes == plain, "the networks have given their memory back by then"
    assert plan(after_bytes=10**11).estimate_bytes == pytest.approx(10**11 + memory.BASE_BYTES + 10**8)
    with pytest.raises(DataError, match=r"at least 2\.6") as caught:
        plan(2 * 10**9, after_bytes=2 * 10**9)
    needed = float(str(caught.value.rule).split()[2])
    assert plan(int((needed + 0.01) * 1e9), after_bytes=2 * 10**9).exact


def test_what_does_not_fit_at_once_is_streamed_as_many_slices_as_fit():
    known = memory.StreamCost(kept_bytes=4e8, per_voxel=350.0)

    def plan(gigabytes: float, cost=known):
        return plan_of_100_slices(gigabytes * 1e9, stream=lambda: cost)

    slice_bytes = (350 + 4 * 2 * (1 + 3)) * 512 * 512
    for gigabytes in (1.1, 1.3, 1.6, 2.0, 3.0):
        pieces = plan(gigabytes)
        fits = int((gigabytes * 1e9 * memory.USABLE - memory.BASE_BYTES - 1e8 - 4e8) // slice_bytes)
        assert (pieces.streamed, pieces.exact, pieces.tile, pieces.window) == (True, True, None, min(fits, 8))
        estimate = memory.BASE_BYTES + 1e8 + 4e8 + pieces.window * slice_bytes
        assert pieces.estimate_bytes == pytest.approx(estimate, abs=1)
    assert not plan(100).streamed, "all at once if it fits"
    assert not plan(2.0, None).streamed
    assert plan(1.0).tile is not None


def test_what_a_stream_takes_grows_with_the_networks_width():
    paper, large = (memory.stream_cost(name, {}, "openvino", 1000) for name in ("distill_dsm", "distill_dsm_l"))
    assert large.per_voxel == 2 * paper.per_voxel
    assert large.kept_bytes == paper.kept_bytes == 1000 * memory.STREAM_COPIES["openvino"]


def test_a_budget_too_small_says_what_would_do():
    def plan(budget: int):
        return plan_of_100_slices(budget)

    with pytest.raises(DataError, match="--max-memory") as caught:
        plan(500_000_000)
    needed = float(str(caught.value.rule).split()[2])
    tile = plan(int((needed + 0.02) * 1e9)).tile
    assert tile is not None
    assert max(tile) <= 128
    whole = plan(3_000_000_000)
    assert (whole.tile, whole.exact) == (None, True)
    assert plan(10**12).window == 100


def test_a_network_of_ones_own_takes_what_its_arithmetic_says():
    ours = activation_bytes("distill_dsm", {}, "openvino")
    assert activation_bytes("inserted", {}, "openvino", 4 * memory.REFERENCE_MACS) == 2 * ours
    assert activation_bytes("inserted", {}, "openvino", 1.0) == ours  # few multiplications need not be few channels
    assert memory.stream_cost("inserted", {}, "openvino", 0, 4 * memory.REFERENCE_MACS).per_voxel == 700
