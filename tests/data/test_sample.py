"""The embedded sample: real anatomy, different subjects, the same bytes for the same seed."""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.config import DownloadConfig, SampleConfig
from distilldsm.core.errors import UserError
from distilldsm.data import sample as sample_module
from distilldsm.data.archive import extract
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.layouts import index_dataset
from distilldsm.data.sample import (
    LABELS,
    MIN_JACOBIAN,
    NOTE,
    _flow,
    _load_template,
    _positions,
    jacobian_determinant,
    make_sample_archive,
)

CONFIG = SampleConfig(subjects=5, seed=3)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return make_sample_archive(tmp_path_factory.mktemp("sample") / "new" / "a.tar", CONFIG)


@pytest.fixture(scope="module")
def cohort(archive, tmp_path_factory) -> tuple[Path, DatasetIndex]:
    root = extract(archive, tmp_path_factory.mktemp("unpacked"))
    return root, index_dataset(root, DownloadConfig(), source="sample")


def loaded(cohort: tuple[Path, DatasetIndex]) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    root, index = cohort
    return [(nib.load(root / case.images[0]), nib.load(root / case.label)) for case in index.cases]


def test_only_the_archive_is_written_and_it_is_an_msd_data_set(archive, cohort):
    assert [p.name for p in archive.parent.iterdir()] == ["a.tar"]
    _, index = cohort
    assert (index.layout, len(index.cases), dict(index.labels)) == ("msd", 5, LABELS)
    assert index.note == NOTE
    assert "no benchmark" in index.note
    assert "McGill" in index.licence
    assert index.channels[0].modality == "MRI"


def test_every_subject_has_both_tissues_and_their_contrast(cohort):
    for image, label in loaded(cohort):
        assert image.shape == label.shape
        assert np.array_equal(image.affine, label.affine)
        values, truth = np.asarray(image.dataobj), np.asarray(label.dataobj)
        share = np.bincount(truth.ravel(), minlength=3) / truth.size
        assert len(share) == 3
        assert (share > 0.03).all()
        means = [values[truth == k].mean() for k in range(3)]
        assert means[2] > means[1] > means[0]
        for z in (0, truth.shape[2] // 2, truth.shape[2] - 1):  # both tissues from the first slice to the last
            assert set(np.unique(truth[:, :, z])) >= {1, 2}


def test_geometry_is_coarse_along_z_varies_and_is_stored_in_two_orientations(cohort):
    images = [image for image, _ in loaded(cohort)]
    spacings = np.array([image.header.get_zooms() for image in images])
    assert len(np.unique(spacings.round(3), axis=0)) == len(images)
    assert (spacings[:, 2] > 1.4 * spacings[:, :2].max(axis=1)).all()
    assert {"".join(nib.aff2axcodes(image.affine)) for image in images} == {"RAS", "LPS"}
    assert len({image.shape for image in images}) > 1
    assert all(40 <= n <= 80 for image in images for n in image.shape[:2])
    assert all(16 <= image.shape[2] <= 30 for image in images)
    assert all(image.get_qform(coded=True)[1] and image.get_sform(coded=True)[1] for image in images)


def test_a_flipped_subject_shows_the_same_head(monkeypatch):
    """In scanner space, storing a subject as LPS changes nothing."""
    template = _load_template()
    flipped = [nib.Nifti1Image.from_bytes(gzip.decompress(b)) for b in sample_module._subject(template, 0, 3)]
    monkeypatch.setattr(sample_module, "ORIENTATION_EVERY", 3)  # so that subject 3 is not turned
    plain = [nib.Nifti1Image.from_bytes(gzip.decompress(b)) for b in sample_module._subject(template, 0, 3)]
    for a, b in zip(flipped, plain, strict=True):
        assert nib.aff2axcodes(a.affine) == ("L", "P", "S")
        assert nib.aff2axcodes(b.affine) == ("R", "A", "S")
        turned = nib.as_closest_canonical(a)
        assert np.allclose(turned.affine, b.affine, atol=1e-4)
        assert np.array_equal(np.asarray(turned.dataobj), np.asarray(b.dataobj))


def test_the_bytes_repeat_with_the_seed_and_change_with_it(archive):
    template = _load_template()
    one, other = sample_module._subject(template, 3, 0), sample_module._subject(template, 4, 0)
    with tarfile.open(archive) as packed:
        members = {Path(info.name).parts[1:]: (info, packed.extractfile(info).read()) for info in packed}
    assert (members["imagesTr", "subject_000.nii.gz"][1], members["labelsTr", "subject_000.nii.gz"][1]) == one
    assert len({one[0], other[0], members["imagesTr", "subject_001.nii.gz"][1]}) == 3
    assert {(info.mtime, info.uid, info.uname) for info, _ in members.values()} == {(0, 0, "")}


@pytest.mark.parametrize(
    ("number", "spacing", "origin", "intensities", "voxels", "centre"),
    [
        (0, (1.4957, 1.4123, 2.6116), (16.1607, -36.3634, 40.8477), (203.8, 623.9, 774.9), (7830, 25975, 21428),
         (22.56, 27.33, 10.78)),
        (3, (-1.5261, -1.4237, 2.272), (115.8154, 124.5438, 25.3067), (86.4, 368.9, 460.1), (12502, 27932, 22310),
         (27.13, 30.16, 12.40)),
    ],
)  # fmt: skip
def test_a_version_of_the_sample_always_makes_the_same_subjects(
    cohort, number, spacing, origin, intensities, voxels, centre
):
    """Numbers of version 1: whoever changes what is made raises VERSION. Rounding may differ between machines."""
    assert sample_module.VERSION == 1
    image, label = loaded(cohort)[number]
    assert np.diag(image.affine)[:3] == pytest.approx(spacing, abs=1e-3)
    assert image.affine[:3, 3] == pytest.approx(origin, abs=1e-3)
    values, truth = np.asarray(image.dataobj), np.asarray(label.dataobj)
    assert np.bincount(truth.ravel()) == pytest.approx(voxels, rel=2e-3)
    assert [values[truth == k].mean() for k in range(3)] == pytest.approx(intensities, rel=1e-3)
    assert np.argwhere(truth == 2).mean(axis=0) == pytest.approx(centre, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_subjects_are_deformed_and_never_folded(seed):
    positions = _positions(_load_template()["t1"].shape, np.random.default_rng(seed))
    determinant = jacobian_determinant(positions)
    assert determinant.min() > 0.05
    assert determinant.max() - determinant.min() > 0.2
    assert np.abs(positions - np.indices(positions.shape[1:])).max() > 3


def test_a_wild_draw_is_tamed(monkeypatch):
    tries = []

    def wild(velocity):
        tries.append(float(np.abs(velocity).max()))
        return _flow(velocity * 4)

    monkeypatch.setattr(sample_module, "_flow", wild)
    positions = _positions((64, 64, 64), np.random.default_rng(0))
    assert len(tries) > 1
    assert tries == sorted(tries, reverse=True)
    assert jacobian_determinant(positions).min() > MIN_JACOBIAN / 2


@settings(deadline=None, max_examples=20)
@given(speed=st.tuples(*[st.floats(-3, 3)] * 3))
def test_the_flow_of_a_constant_velocity_is_a_shift(speed):
    velocity = np.broadcast_to(np.float32(speed)[:, None, None, None], (3, 9, 8, 7)).copy()
    assert np.allclose(_flow(velocity), velocity, atol=1e-4)


def test_the_flow_back_undoes_the_flow():
    axes = np.indices((24, 24, 24), dtype=np.float32) / 24 * np.pi
    window = np.prod(np.sin(axes) ** 2, axis=0)
    velocity = np.stack([2 * window, -1.5 * window, window]).astype(np.float32)
    there, back = _flow(velocity), _flow(-velocity)
    grid = np.indices((24, 24, 24), dtype=np.float32)
    from scipy import ndimage

    again = there + np.stack([ndimage.map_coordinates(b, grid + there, order=1, mode="nearest") for b in back])
    assert np.abs(again).max() < 0.1 < np.abs(there).max()


def test_jacobian_of_a_scaling():
    grid = np.indices((5, 5, 5), dtype=np.float32)
    assert np.allclose(jacobian_determinant(grid * np.float32([2, 3, 0.5])[:, None, None, None]), 3)
    assert (jacobian_determinant(grid[:, ::-1]) < 0).all()


def test_a_missing_template_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install nilearn"):
        make_sample_archive(tmp_path / "a.tar", CONFIG)
    assert not (tmp_path / "a.tar").exists()


def test_nilearn_and_torch_are_not_imported():
    code = "import sys, distilldsm.data.sample as s; s._load_template(); print({'nilearn', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
