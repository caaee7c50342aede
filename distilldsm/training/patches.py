"""Draw training patches from memory-mapped cases. Needs only numpy.

Every draw depends only on (seed, epoch, position in the epoch). So the patches are the same in a resumed run and with
any number of loader processes and training processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json

MARGIN = 1.2
"""Patches are read larger by this factor, so that rotated patches contain image up to the border."""


class PatchSampler:
    """Draws batches of patches from a preprocessed data set.

    Args:
        root: the preprocessed directory.
        case_ids: cases to draw from.
        patch_size: (D, H, W).
        stride: (D, H, W); sizes are multiples of it, as the network requires.
        margin: patches are read larger by this factor.
    """

    def __init__(
        self,
        root: Path,
        case_ids: Sequence[str],
        *,
        patch_size: tuple[int, int, int],
        stride: tuple[int, int, int],
        foreground_oversampling: float,
        samples_per_case: int,
        batch_size: int,
        seed: int,
        margin: float = MARGIN,
    ) -> None:
        self.root = Path(root)
        self.case_ids = list(case_ids)
        self.foreground_oversampling = foreground_oversampling
        self.samples_per_case = samples_per_case
        self.batch_size = batch_size
        self.seed = seed
        self.margin = margin
        self.patch_size = tuple(-(-n // s) * s for n, s in zip(patch_size, stride, strict=True))
        self.depth_stride = stride[0]
        self.labels = "shares" if (self.root / "shares").is_dir() else "labels"
        self.depths = np.array(
            [read_json(self.root / "cases" / f"{c}.json")["geometry"]["resampled"][0] for c in self.case_ids]
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch, at least one."""
        return max(1, len(self.case_ids) * self.samples_per_case // self.batch_size)

    def epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Case indices of an epoch's samples, in order. Cases are repeated to fill the last batch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.case_ids) * self.samples_per_case)
        needed = self.steps_per_epoch * self.batch_size
        return np.resize(order, needed) % len(self.case_ids)

    def batch(
        self, epoch: int, step: int, *, rank: int = 0, world: int = 1
    ) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8], tuple[int, int, int]]:
        """This rank's share of one batch.

        Returns:
            images (B, C, D', H', W'), labels (B, D', H', W') with the margin, and the size (D, H, W) of the final crop.
            Of a data set with `shares`, these (B, K - 1, D', H', W') instead of labels.
            D is the smallest depth of the batch's cases, at most the patch's depth. So there are no padded slices, from
            which a network that uses neighbouring slices would learn.
        """
        first = step * self.batch_size
        positions = range(first + rank, first + self.batch_size, world)
        cases = self.epoch_order(epoch)
        share = cases[list(positions)]
        depth = min(int(self.patch_size[0]), int(self.depths[cases[first : first + self.batch_size]].min()))
        depth = max(depth // self.depth_stride, 1) * self.depth_stride
        size = (depth, int(self.patch_size[1]), int(self.patch_size[2]))
        drawn = [self._draw(int(case), epoch, position, size) for case, position in zip(share, positions, strict=True)]
        return np.stack([d[0] for d in drawn]), np.stack([d[1] for d in drawn]), size

    def _draw(
        self, case: int, epoch: int, position: int, size: tuple[int, int, int]
    ) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        rng = np.random.default_rng([self.seed, epoch, position, 1])
        name = self.case_ids[case]
        image = open_array(self.root / "images" / f"{name}.npy")
        label = open_array(self.root / self.labels / f"{name}.npy")
        centre = self._centre(name, image.shape[1:], size, rng)
        grown = tuple(round(n * self.margin) for n in size)
        cut = _cut(label.reshape(-1, *image.shape[1:]), centre, grown)
        return _cut(image, centre, grown), cut if label.ndim == 4 else cut[0]

    def _centre(
        self, name: str, shape: Sequence[int], size: Sequence[int], rng: np.random.Generator
    ) -> tuple[int, int, int]:
        """Centre of a patch: a foreground voxel of a random class, or any voxel. The patch stays inside if it fits."""
        wanted: Sequence[int] | None = None
        if rng.random() < self.foreground_oversampling:
            locations = open_array(self.root / "locations" / f"{name}.npy")
            if len(locations):
                classes = np.unique(locations[:, 0])
                of_class = locations[locations[:, 0] == rng.choice(classes)]
                wanted = of_class[rng.integers(len(of_class))][1:].tolist()
        centre = []
        for axis, (n, s) in enumerate(zip(shape, size, strict=True)):
            low, high = s // 2, n - (s - s // 2)
            if high <= low:
                # The volume is smaller than the patch: place it at random inside the patch.
                centre.append(int(rng.integers(high, low + 1)))
            elif wanted is not None:
                centre.append(int(np.clip(wanted[axis], low, high)))
            else:
                centre.append(int(rng.integers(low, high + 1)))
        return centre[0], centre[1], centre[2]


def open_array(path: Path) -> npt.NDArray:
    """Open a .npy file memory-mapped.

    Raises:
        DataError: missing or damaged.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # noqa: TID251 - no pickles
        if not isinstance(array, np.ndarray):  # np.load looks at the content, not the name
            array.close()
            raise ValueError("a .npz archive")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            "cannot be read",
            where=path,
            seen=str(error),
            rule="one array of numbers in NumPy's .npy format; nothing is unpickled",
            hint="run dvc repro preprocess",
        ) from None
    return array


def _cut(array: npt.NDArray, centre: Sequence[int], size: Sequence[int]) -> npt.NDArray:
    """Cut the block of `size` around `centre` out of (C, D, H, W); zeros beyond the volume."""
    out = np.zeros((array.shape[0], *size), dtype=array.dtype)
    source, target = [slice(None)], [slice(None)]
    for n, c, s in zip(array.shape[1:], centre, size, strict=True):
        start = c - s // 2
        low, high = max(start, 0), min(start + s, n)
        source.append(slice(low, max(high, low)))
        target.append(slice(low - start, max(high, low) - start))
    out[tuple(target)] = array[tuple(source)]
    return out
