"""From a stored scan to a mask in pieces along the depth: exact, with memory that does not grow with the depth.

Input slices are normalised and resampled one by one, the network sees windows of slices, its scores are resampled
back and labelled slice by slice. No array of scores ever spans the volume. Labels are those of the whole volume in one
piece: every step computes a slice from its neighbours in the same order of operations (see data/resampling.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.data.geometry import GeometryRecord, Normaliser, make_record
from distilldsm.data.plan import Plan
from distilldsm.data.resampling import CubicSlices, LinearSlices
from distilldsm.inference.engines import Engine, open_stream
from distilldsm.inference.scores import Scorer
from distilldsm.inference.windows import UNBOUNDED_HALO, Window, stream_chunks
from distilldsm.io import Scan
from distilldsm.io.orientation import reorient

Float32 = npt.NDArray[np.float32]
Clock = Callable[[str], AbstractContextManager[object]]
"""Measures a phase: `with clock("network"): ...`."""
Piece = tuple[int, list[Float32]]
"""Number of the first slice, and the scores (K, H, W) of it and the following ones."""

OVERLAP = 0.5
"""Of neighbouring tiles, where slices do not fit in memory."""


def depth_windows(depth: int, size: int, halo: int | None, stride: int) -> list[Window]:
    """Windows that cover a padded depth, each kept slice with its halo inside (or at the volume's end).

    With a known halo all windows have one size, so that a runtime needs one set of buffers. `halo` None (the logits
    depend on the whole depth): chunks with an overlap of UNBOUNDED_HALO, nearly the same logits.
    """
    if size >= depth:
        return [Window(0, depth, 0, depth)]
    windows: list[Window] = []
    if halo is None:
        core = max(size - 2 * UNBOUNDED_HALO, stride) // stride * stride
        for start in range(0, depth, core):
            stop = min(start + core, depth)
            windows.append(Window(max(start - UNBOUNDED_HALO, 0), min(stop + UNBOUNDED_HALO, depth), start, stop))
        return windows
    start = 0
    while start < depth:
        low = min(max(start - halo, 0) // stride * stride, depth - size)
        stop = depth if low + size == depth else low + size - halo
        if stop <= start:
            raise ValueError(f"a window of {size} slices leaves nothing between halos of {halo}")
        windows.append(Window(low, low + size, start, stop))
        start = stop
    return windows


class NetworkImage:
    """A scan in network space, (C, D, H, W), slice by slice.

    Raises (when made):
        DataError: an axis without a direction.
    """

    def __init__(self, scan: Scan, plan: Plan) -> None:
        views, read = scan.planes(plan.axis_order)
        depth, height, width = views[0].shape
        whole = ((0, 0, 0), (depth, height, width))
        start, stop = _nonzero_box(read, len(views), views[0].shape) if plan.crop_to_nonzero else whole
        self.record: GeometryRecord = make_record(scan.affine, scan.shape, start, stop, plan)
        rows, columns = slice(start[1], stop[1]), slice(start[2], stop[2])
        first = start[0]

        class Planes:
            """The cropped slices of one channel; iterated twice for its mean and sd."""

            def __init__(self, channel: int) -> None:
                self.channel = channel

            def __iter__(self) -> Iterator[npt.NDArray]:
                return (read(self.channel, k)[rows, columns] for k in range(start[0], stop[0]))

        rules = [Normaliser(rule, Planes(c)) for c, rule in enumerate(plan.normalisation)]

        def normalised(k: int) -> Float32:
            return np.stack([rule(read(c, first + k)[rows, columns]) for c, rule in enumerate(rules)])

        cropped = [b - a for a, b in zip(start, stop, strict=True)]
        self._slices = CubicSlices(normalised, cropped, self.record.resampled, coarse_slices=plan.coarse_slices)
        self.cropped = tuple(cropped)
        self.channels = len(views)
        self._low = 0
        self._kept: list[Float32] = []

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        return self.record.resampled

    def slices(self, low: int, high: int) -> Iterator[Float32]:
        """Slices [low, high), (C, H, W) each; asked for with ascending `low`, each is computed once."""
        drop = min(max(low - self._low, 0), len(self._kept))
        del self._kept[:drop]
        self._low = low if not self._kept else self._low + drop
        for k in range(low, high):
            if k - self._low == len(self._kept):
                self._kept.append(self._slices(k))
            yield self._kept[k - self._low]


def network_scores(
    scorer: Scorer,
    image: NetworkImage,
    *,
    stride: Sequence[int],
    depth_halo: int | None,
    window: int,
    tile: tuple[int, int] | None,
    clock: Clock,
    streamed: bool = False,
) -> Iterator[Piece]:
    """Scores of consecutive slices in ascending order: (number of the first, [(K, H, W), ...]).

    streamed: `window` slices at a time go through the network once, without halo (depth_stream.py).

    Raises:
        DataError: scores that are not finite; a mask made from them would be garbage.
    """

    shape = image.shape
    padded = [-(-n // s) * s for n, s in zip(shape, stride, strict=True)]
    d, h, w = ((p - n) // 2 for p, n in zip(padded, shape, strict=True))

    def run(engine: Engine, piece: Float32) -> Float32:
        if stream is not None:
            return stream(piece, part.low, padded[0])[0]
        return engine(piece)[0] if tile is None else blend_tiles(engine, piece, tile)

    stream, lag = None, 0
    if not streamed:
        parts = depth_windows(padded[0], window, depth_halo, stride[0])
    else:
        assert depth_halo is not None
        assert scorer.single is not None
        lag, parts = depth_halo, stream_chunks(padded[0], window, depth_halo)
        stream = open_stream(scorer.single, (1, image.channels, window, padded[1], padded[2]), lag=lag)
        if stream is None:
            raise DataError("the network cannot be streamed", hint="predict with --engine onnx, which needs no stream")
    for part in parts:
        with clock("preprocess"):
            low, high = max(part.low - d, 0), min(part.high - d, shape[0])
            piece = np.zeros((1, image.channels, part.high - part.low, *padded[1:]), dtype=np.float32)
            for k, plane in enumerate(image.slices(low, high), start=low + d - part.low):
                piece[0, :, k, h : h + shape[1], w : w + shape[2]] = plane
        with clock("network"):
            # What the depth was padded by is cut away here.
            start, stop = max(part.start, d), min(part.stop, d + shape[0])
            first = part.low - lag
            keep = (slice(start - first, stop - first), slice(h, h + shape[1]), slice(w, w + shape[2]))
            with np.errstate(over="ignore", invalid="ignore"):
                scores = scorer(piece, keep, run)
            del piece
            if not np.isfinite(scores).all():
                raise DataError(
                    "the network's scores are not finite",
                    seen=f"slices {start - d} to {stop - d - 1}",
                    rule="intensities of the kind the network was trained on",
                    hint="check the scan's intensities and the header's scaling",
                )
            # One array per slice: each can go as soon as it has been used.
            planes = [scores[:, k].copy() for k in range(stop - start)]
            del scores
        yield start - d, planes


def blend_tiles(engine: Engine, piece: Float32, tile: tuple[int, int]) -> Float32:
    """Logits (K, D, H, W) of a piece (1, C, D, H, W) from overlapping tiles, weighted by a Gaussian.

    Not exact: near a tile's border the network sees less than it would in the whole slice.
    """
    height, width = piece.shape[3:]
    weight = np.outer(_gaussian(tile[0]), _gaussian(tile[1])).astype(np.float32)
    total: Float32 | None = None
    weights = np.zeros((height, width), dtype=np.float32)
    for y in tile_starts(height, tile[0]):
        for x in tile_starts(width, tile[1]):
            box = (..., slice(y, y + tile[0]), slice(x, x + tile[1]))
            logits = engine(np.ascontiguousarray(piece[box]))[0]
            if total is None:
                total = np.zeros((*logits.shape[:2], height, width), dtype=np.float32)
            logits *= weight
            total[box] += logits
            weights[box] += weight
    assert total is not None
    total /= weights
    return total


def tile_starts(size: int, tile: int) -> list[int]:
    """Starts of overlapping tiles that cover `size`, the last one flush with its end."""
    if tile >= size:
        return [0]
    step = max(int(tile * (1 - OVERLAP)), 1)
    count = -(-(size - tile) // step) + 1
    return [round(k * (size - tile) / (count - 1)) for k in range(count)]


def _gaussian(size: int) -> npt.NDArray[np.float64]:
    positions = np.arange(size) - (size - 1) / 2
    # Never so small that the quotient of two rounding errors would be a logit.
    return np.maximum(np.exp(-0.5 * (positions / (size / 8)) ** 2), 1e-3)


def predict_scan(
    scorer: Scorer,
    image: NetworkImage,
    plan: Plan,
    mask: npt.NDArray[np.uint8],
    *,
    stride: Sequence[int],
    depth_halo: int | None,
    window: int,
    tile: tuple[int, int] | None = None,
    probabilities: npt.NDArray[np.uint8] | None = None,
    clock: Clock = lambda phase: nullcontext(),
    track: Callable[[Iterator[Piece]], Iterator[Piece]] = iter,
    streamed: bool = False,
) -> npt.NDArray[np.int64]:
    """Fill `mask` (X, Y, Z), zeros on entry, with label values; returns the voxels per class.

    Args:
        probabilities: (X, Y, Z, K), zeros on entry, filled with round(255 p) where given.
        clock: told which phase is running.
        track: goes through the pieces, e.g. to show progress.
        streamed: see `network_scores`; of one network that can be streamed.
    """
    record = image.record
    affine = np.array(record.affine)
    (d0, h0, w0), (d1, h1, w1) = record.crop_start, record.crop_stop
    out = reorient(mask[None], affine, record.axis_order)[0]
    maps = None
    if probabilities is not None:
        if not plan.regions:
            probabilities[..., 0] = 255  # what is cropped away is background
        maps = reorient(np.moveaxis(probabilities, -1, 0), affine, record.axis_order)
    targets, values = plan.targets, np.array(plan.class_values, dtype=np.uint8)
    counts = np.zeros(len(values), dtype=np.int64)
    counts[0] = mask.size - (d1 - d0) * (h1 - h0) * (w1 - w0)

    kept: dict[int, Float32] = {}
    restored = LinearSlices(kept.__getitem__, image.shape, image.cropped, coarse_slices=plan.coarse_slices)
    done = 0
    pieces = network_scores(
        scorer,
        image,
        stride=stride,
        depth_halo=depth_halo,
        window=window,
        tile=tile,
        clock=clock,
        streamed=streamed,
    )
    for first, planes in track(pieces):
        with clock("restore"):
            stop = first + len(planes)
            kept.update(enumerate(planes, start=first))
            planes.clear()
            while done < d1 - d0 and restored.last_needed(done) < stop:
                plane = restored(done)
                classes = targets.classes(plane)
                counts += np.bincount(classes.ravel(), minlength=len(values))
                out[d0 + done, h0:h1, w0:w1] = values[classes]
                if maps is not None:
                    maps[:, d0 + done, h0:h1, w0:w1] = np.rint(plane * 255)
                done += 1
                needed = restored.first_needed(done) if done < d1 - d0 else stop
                for k in [k for k in kept if k < needed]:
                    del kept[k]
    return counts


def _nonzero_box(
    read: Callable[[int, int], npt.NDArray], channels: int, shape: Sequence[int]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """As `geometry.nonzero_box`, one slice at a time."""
    hits = [np.zeros(n, dtype=bool) for n in shape]
    for k in range(shape[0]):
        plane = np.zeros(tuple(shape[1:]), dtype=bool)
        for channel in range(channels):
            plane |= read(channel, k) != 0
        hits[0][k] = plane.any()
        hits[1] |= plane.any(axis=1)
        hits[2] |= plane.any(axis=0)
    start, stop = [], []
    for hit, size in zip(hits, shape, strict=True):
        found = np.flatnonzero(hit)
        start.append(int(found[0]) if found.size else 0)
        stop.append(int(found[-1]) + 1 if found.size else size)
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])
