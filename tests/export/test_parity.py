"""The comparison of exported models with the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.core.errors import UserError
from distilldsm.core.files import write_json
from distilldsm.data.targets import Targets
from distilldsm.export import parity
from distilldsm.models.package import Int8Report
from tests.inference.engines import Function

TARGETS = Targets(("background", "inside"), (0, 1))


@pytest.fixture
def preprocessed(tmp_path) -> Path:
    """Five cases a to e of 2 to 6 slices; the image is +-1, the truth where it is positive."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels", "cases"):
        (tmp_path / name).mkdir()
    for depth, case in zip((4, 2, 6, 3, 5), "abcde", strict=True):
        image = rng.choice([-1.0, 1.0], size=(1, depth, 8, 8)).astype(np.float16)
        np.save(tmp_path / "images" / f"{case}.npy", image)
        np.save(tmp_path / "labels" / f"{case}.npy", (image[0] > 0).astype(np.uint8))
        write_json(tmp_path / "cases" / f"{case}.json", {"geometry": {"resampled": [depth, 8, 8]}})
    return tmp_path


def right(image: np.ndarray) -> np.ndarray:
    """Right everywhere: the second class wins where the image is positive."""
    return np.concatenate([-image, image], axis=1)


network = Function(right, depth_halo=0)


def wrong_in(voxels: int):
    """The network, but for the first `voxels` voxels of the volume, where the classes are exchanged."""

    def engine(image: np.ndarray) -> np.ndarray:
        logits = right(image).reshape(1, 2, -1).copy()
        logits[:, :, :voxels] = logits[:, ::-1, :voxels]
        return logits.reshape(1, 2, *image.shape[2:])

    return Function(engine, depth_halo=0)


def compare(preprocessed, runtimes, cases=("b", "a", "c")):
    return parity.compare(network, runtimes, preprocessed, cases, targets=TARGETS)


def test_cases_span_the_sizes(preprocessed):
    assert parity.choose_cases(preprocessed, list("abcde"), 3) == ["b", "a", "c"]  # 2, 4 and 6 slices
    assert parity.choose_cases(preprocessed, list("edcba"), 2) == ["b", "c"]
    assert parity.choose_cases(preprocessed, list("abcde"), 1) == ["a"]
    assert parity.choose_cases(preprocessed, list("abcde"), 9) == ["b", "d", "a", "e", "c"]


def test_every_difference_is_counted(preprocessed):
    rows = compare(preprocessed, {"same": network, "off": wrong_in(3)})
    assert [(r.case, r.runtime) for r in rows] == [(c, r) for c in "bac" for r in ("same", "off")]
    same, off = rows[:2]
    assert (same.differing_voxels, same.max_logit_difference, set(same.dice_difference.values())) == (0, 0.0, {0.0})
    assert off.shape == (2, 8, 8)
    assert (off.differing_voxels, off.voxel_difference) == (3, 3 / 128)
    assert off.max_logit_difference == 2.0  # from -1 to 1
    assert off.dice_network == {"inside": 1.0}
    truth = np.load(preprocessed / "labels" / "b.npy").ravel()
    predicted = truth.copy()
    predicted[:3] = 1 - predicted[:3]
    expected = 2 * (truth & predicted).sum() / (truth.sum() + predicted.sum())
    assert off.dice_runtime["inside"] == pytest.approx(expected)


def test_cases_of_one_size_are_also_compared_smaller(preprocessed):
    rows = parity.compare(network, {"same": network}, preprocessed, ["c"], targets=TARGETS, sizes=3)
    assert [r.shape for r in rows] == [(6, 8, 8), (5, 5, 3), (4, 2, 1)]
    assert {r.case for r in rows} == {"c"}


@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    limit=st.integers(1, 5000),
    corner=st.tuples(*[st.floats(0, 0.999)] * 3),
)
def test_the_part_of_a_large_volume_is_around_its_structures(shape, limit, corner):
    labels = np.zeros(shape, dtype=np.uint8)
    inside = tuple(int(c * n) for c, n in zip(corner, shape, strict=True))
    labels[inside] = 1
    part = labels[parity.compared_part(labels, limit)]
    assert part.size <= limit
    assert part.any()
    if labels.size <= limit:
        assert part.shape == labels.shape
    elif shape[0] >= 16 and shape[1] * shape[2] * 16 <= limit:
        assert part.shape == (limit // (shape[1] * shape[2]), *shape[1:]), "whole slices, as many as may be"
    empty = parity.compared_part(np.zeros(shape, dtype=np.uint8), limit)
    assert labels[empty].shape == part.shape


def test_a_large_volume_is_compared_on_a_part_and_the_network_asked_once(preprocessed, monkeypatch):
    monkeypatch.setattr(parity.compared_part, "__defaults__", (300,))
    counted, remembered = Function(right, depth_halo=0), {}
    for runtime in ("onnx", "auto"):
        settings = {"targets": TARGETS, "remembered": remembered}
        rows = parity.compare(counted, {runtime: wrong_in(3)}, preprocessed, ("b", "a", "c"), **settings)
        assert [(r.runtime, r.shape) for r in rows] == [(runtime, shape) for shape in ((2, 8, 8), (4, 8, 8), (6, 7, 7))]
        assert [r.differing_voxels for r in rows] == [3, 3, 3]
    assert len(counted.shapes) == 3


def test_the_limit_is_on_the_worst_case(preprocessed):
    rows = compare(preprocessed, {"onnx": network, "openvino": wrong_in(3)})
    parity.require_parity(rows, 3 / 128)
    with pytest.raises(UserError, match=r"\(openvino\) disagrees.*") as caught:
        parity.require_parity(rows, 3 / 128 - 1e-9)
    message = str(caught.value)
    assert "case b" in message
    assert "3 voxels differ" in message
    assert "export.max_voxel_difference" in message
    assert [r.case for r in parity.beyond_limit(rows, 0)] == ["b", "a", "c"]


@pytest.mark.parametrize("who", ["torch", "onnx"])
def test_values_that_are_not_finite_are_refused(preprocessed, who, monkeypatch):
    broken = Function(lambda image: np.full_like(right(image), np.nan), depth_halo=0)
    with pytest.raises(UserError, match=f"case a, {who}: the network's outputs are not finite"):
        parity.compare(
            broken if who == "torch" else network,
            {"onnx": broken},
            preprocessed,
            ["a"],
            targets=TARGETS,
        )


def test_summary_takes_the_worst_and_the_largest_volume(preprocessed):
    rows = compare(preprocessed, {"onnx": network, "openvino": wrong_in(3)})
    found = parity.summary(rows)
    assert found["onnx"]["voxel_difference"] == 0
    assert found["openvino"]["voxel_difference"] == 3 / 128
    assert found["openvino"]["dice_difference"] == max(1 - r.dice_runtime["inside"] for r in rows[1::2])
    largest = next(r for r in rows if r.case == "c" and r.runtime == "openvino")
    assert found["openvino"]["seconds_per_mvoxel"] == pytest.approx(largest.seconds / (6 * 64 / 1e6))
    table = parity.report(rows, 0.5, "FP16", Int8Report(shipped=False, reason="not made"))
    assert table["summary"] == found
    assert [c["case"] for c in table["cases"]] == ["b", "b", "a", "a", "c", "c"]
