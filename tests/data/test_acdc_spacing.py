"""The benchmark that hints ACDC's lost spacings changes headers only."""

import gzip

import nibabel
import numpy as np
import pytest

from benchmarks.acdc_spacing import with_estimated_spacing


@pytest.mark.parametrize("shape", [(428, 512, 3), (256, 216, 4), (154, 224, 2)])
def test_longer_side_spans_the_field_of_view_and_all_else_stays(shape):
    voxels = np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)
    affine = np.array([[0, -1.5, 0, 7], [1.5, 0, 0, -3], [0, 0, 10, 5], [0, 0, 0, 1.0]])
    before = nibabel.Nifti1Image(voxels, affine)
    after = nibabel.Nifti1Image.from_bytes(
        gzip.decompress(with_estimated_spacing(gzip.compress(before.to_bytes()), field_of_view_mm=384.0))
    )
    assert np.array_equal(np.asanyarray(after.dataobj), voxels)
    spacing = 384.0 / max(shape)
    assert np.allclose(after.header.get_zooms(), (spacing, spacing, 10.0))
    assert np.allclose(after.affine[:3, :2] * (1.5 / spacing), affine[:3, :2])  # the same directions
    centre = [*((n - 1) / 2 for n in shape), 1.0]
    assert np.allclose(after.affine @ centre, affine @ centre, atol=1e-3)
