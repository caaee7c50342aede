"""Classes and regions: what output channels stand for, and how masks are written from them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import DiceLoss

from distilldsm.core.errors import ConfigError, DataError
from distilldsm.data.descriptions import split_regions
from distilldsm.data.targets import Region, Targets, regions_from_labels, sigmoid
from distilldsm.training.losses import segmentation_loss, soft_dice_loss
from distilldsm.training.validation import structure_dice

LABELS = {"background": 0, "necrotic_core": 1, "oedema": 2, "enhancing_tumour": 4}
REGIONS = {
    "ET": ["enhancing_tumour"],
    "WT": ["oedema", "necrotic_core", "enhancing_tumour"],
    "TC": ["necrotic_core", "enhancing_tumour"],
}
BRATS = Targets(tuple(LABELS), tuple(LABELS.values()), regions_from_labels(REGIONS, LABELS))


def test_brats_regions_are_written_from_the_outermost_in():
    assert [(r.name, set(r.values), r.written_as) for r in BRATS.regions] == [
        ("WT", {1, 2, 4}, 2),
        ("TC", {1, 4}, 1),
        ("ET", {4}, 4),
    ]
    assert BRATS.channels == 3
    assert BRATS.channel_names == ("WT", "TC", "ET")
    assert BRATS.structures["TC"] == (1, 4)


@given(st.permutations(list(REGIONS)))
def test_the_order_of_a_mapping_does_not_matter(names):
    assert regions_from_labels({name: REGIONS[name] for name in names}, LABELS) == BRATS.regions


def obvious(scores: np.ndarray) -> np.ndarray:
    """Label values, voxel by voxel: the rule of the BraTS evaluation."""
    out = np.zeros(scores.shape[1:], dtype=int)
    for where in np.ndindex(out.shape):
        whole, core, enhancing = (scores[(k, *where)] > 0.5 for k in range(3))
        if whole:
            out[where] = 2
        if core:
            out[where] = 1
        if enhancing:
            out[where] = 4
    return out


@given(st.integers(0, 2**32 - 1))
def test_masks_are_written_region_by_region(seed):
    logits = np.random.default_rng(seed).normal(0, 2, (3, 4, 3, 5)).astype(np.float32)
    scores = BRATS.probabilities(logits)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=1e-6)
    values = np.array(BRATS.class_values)[BRATS.classes(scores)]
    np.testing.assert_array_equal(values, obvious(scores))
    np.testing.assert_array_equal(BRATS.classes_of_logits(logits), BRATS.classes(scores))


def test_classes_exclude_each_other_where_there_are_no_regions():
    plain = Targets(tuple(LABELS), tuple(LABELS.values()))
    logits = np.random.default_rng(0).normal(size=(4, 2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(plain.probabilities(logits).sum(axis=0), 1, rtol=1e-6)
    np.testing.assert_array_equal(plain.classes(plain.probabilities(logits)), logits.argmax(axis=0))
    assert plain.structures == {"necrotic_core": (1,), "oedema": (2,), "enhancing_tumour": (4,)}


def test_sigmoid_of_extreme_logits():
    values = sigmoid(np.array([-1e30, -90.0, 0.0, 90.0, 1e30, np.nan], dtype=np.float32))
    np.testing.assert_allclose(values[:5], [0, 0, 0.5, 1, 1], atol=1e-30)
    assert np.isnan(values[5])


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ({"a": ["oedema", "tumour"]}, "unknown label"),
        ({"a": ["background"]}, "unknown label"),
        ({"a": ["oedema", "necrotic_core"]}, "cannot be written"),
        ({"a": ["oedema", "necrotic_core"], "b": ["oedema"], "c": ["necrotic_core"]}, "none"),
    ],
)
def test_regions_that_no_mask_can_show_are_refused(regions, words):
    with pytest.raises(ConfigError, match=words):
        regions_from_labels(regions, LABELS)


def test_a_region_must_know_its_labels():
    with pytest.raises(ConfigError, match="does not have"):
        Targets(("background", "a"), (0, 1), (Region(name="r", values=(2,), written_as=2),))
    with pytest.raises(ConfigError, match="outside it"):
        Region(name="r", values=(1, 2), written_as=3)


def test_region_loss_is_that_of_monai():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6)
    classes = torch.randint(0, 4, (2, 4, 5, 6))
    membership = torch.from_numpy(BRATS.membership())
    truth = torch.stack([torch.isin(torch.tensor(BRATS.class_values)[classes], torch.tensor(v)) for v in BRATS_VALUES])
    truth = truth.transpose(0, 1).float()
    monai = DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(logits, truth)
    torch.testing.assert_close(soft_dice_loss(logits, classes, regions=membership), monai)
    both = segmentation_loss(logits, classes, dice_weight=1.0, cross_entropy_weight=2.0, regions=membership)
    entropy = torch.nn.BCELoss()(logits.double().sigmoid(), truth.double()).float()
    torch.testing.assert_close(both, monai + 2 * entropy)


BRATS_VALUES = [(1, 2, 4), (1, 4), (4,)]


def test_structure_dice_of_regions():
    truth = np.array([0, 1, 2, 3])  # classes: background, core, oedema, enhancing
    prediction = np.array([0, 2, 2, 3])
    assert structure_dice(prediction, truth, BRATS) == [1.0, pytest.approx(2 / 3), 1.0]


def test_nnunet_regions(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    plain, regions = split_regions(labels, {"regions_class_order": [1, 2, 3]}, tmp_path)
    assert plain == {"background": 0, "label_1": 1, "label_2": 2, "enhancing": 3}
    assert [(r.name, r.values, r.written_as) for r in regions] == [
        ("whole", (1, 2, 3), 1),
        ("core", (2, 3), 2),
        ("enhancing", (3,), 3),
    ]
    for description in ({}, {"regions_class_order": [1, 2]}, {"regions_class_order": [1, 1, 3]}):
        with pytest.raises(DataError):
            split_regions(labels, json.loads(json.dumps(description)), tmp_path)


@pytest.mark.parametrize(
    ("regions", "largest", "together"),
    [
        ({}, {"necrotic_core": (1,), "oedema": (2,), "enhancing_tumour": (4,)}, 1),
        (REGIONS, {"WT": (2, 1, 4)}, 3),
        ({"a": ["oedema"], "b": ["necrotic_core"], "c": ["enhancing_tumour"]}, {"a": (2,), "b": (1,), "c": (4,)}, 1),
        ({"all": ["oedema", "necrotic_core"], "in": ["oedema"]}, {"all": (2, 1)}, 2),
        ({"a": ["oedema", "necrotic_core"], "b": ["oedema"], "c": ["enhancing_tumour"]}, {}, 0),
    ],
)
def test_of_what_the_largest_component_may_be_kept(regions, largest, together):
    targets = Targets(tuple(LABELS), tuple(LABELS.values()), regions_from_labels(regions, LABELS))
    assert targets.largest == largest
    assert targets.changed_with.keys() == largest.keys()
    for name, changed in targets.changed_with.items():
        assert len(changed) == together
        assert name in changed
