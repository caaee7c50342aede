"""Class probabilities of a piece of an image: the mean over one or more networks and over mirrored views.

This is the only place where logits become probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from distilldsm.config import MirrorAxis
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.data.targets import softmax
from distilldsm.inference.depth_stream import Shape
from distilldsm.inference.engines import Engine, Stream

Float32 = npt.NDArray[np.float32]
Mirror = Literal["trained"] | tuple[MirrorAxis, ...]
"""Axes to mirror along: the axes of the training, or the listed axes."""
Box = tuple[slice, slice, slice]
"""A part of (D, H, W)."""
Run = Callable[[Engine, Float32], Float32]
"""Runs an engine on a piece (1, C, D, H, W) and returns logits (K, D, H, W)."""

AXES: dict[MirrorAxis, int] = {"depth": 2, "height": 3, "width": 4}
"""Axis name to its index in (1, C, D, H, W)."""
WHOLE: Box = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Member:
    """A network and its mirror axes: probabilities are averaged over the flips along these axes."""

    engine: Engine
    mirror_axes: tuple[MirrorAxis, ...] = ()


class Ensemble:
    """Mean probabilities over the members. Each member averages its mirrored views: 2^n views for n axes.

    Args:
        members: networks of one task: the same input channels, output classes and stride. If there are several, each
            frees its memory after its turn.
        activation: logits (K, D, H, W) to probabilities, voxel by voxel.
    """

    def __init__(self, members: Sequence[Member], *, activation: Callable[[Float32], Float32] = softmax) -> None:
        self.members = tuple(members)
        self.activation = activation
        self.stride = members[0].engine.stride

    @property
    def depth_halo(self) -> int | None:
        """The largest halo of all networks; None if the logits of one network depend on the whole depth."""
        halos = [member.engine.depth_halo for member in self.members]
        known = [halo for halo in halos if halo is not None]
        return max(known) if len(known) == len(halos) else None

    @property
    def mirrored(self) -> bool:
        """Whether any member uses mirrored views."""
        return any(member.mirror_axes for member in self.members)

    @property
    def _streamable(self) -> Engine | None:
        """The engine if there is only one and it uses no mirrored views; else None. Only then streaming is possible.

        Each of several networks or mirrored views would have to store its own features.
        """
        first = self.members[0]
        single = len(self.members) == 1 and not first.mirror_axes
        return first.engine if single and self.depth_halo and self.stride[0] == 1 else None

    def open_stream(self, shape: Shape) -> Stream | None:
        """See `Engine.open_stream`."""
        return None if self._streamable is None else self._streamable.open_stream(shape)

    def stream_bytes(self, shape: Shape) -> int | None:
        """See `Engine.stream_bytes`."""
        return None if self._streamable is None else self._streamable.stream_bytes(shape)

    def release(self) -> None:
        """Free the memory of all networks; the next call allocates it again."""
        for member in self.members:
            member.engine.release()

    def __call__(self, piece: Float32, keep: Box = WHOLE, run: Run = lambda engine, piece: engine(piece)[0]) -> Float32:
        """Probabilities (K, d, h, w) of the part `keep` of a piece (1, C, D, H, W).

        The whole piece is mirrored, with padding and halo. So each slice keeps its neighbours, and pieces give the same
        probabilities as the whole volume.

        Raises:
            DataError: logits are NaN or infinite.
        """
        total = self._of(self.members[0], piece, keep, run)
        for member in self.members[1:]:
            total += self._of(member, piece, keep, run)
        if len(self.members) > 1:
            total /= np.float32(len(self.members))
        return total

    def _of(self, member: Member, piece: Float32, keep: Box, run: Run) -> Float32:
        every = views(member.mirror_axes)
        total: Float32 | None = None
        for axes in every:
            logits = run(member.engine, np.ascontiguousarray(np.flip(piece, axes)) if axes else piece)
            kept = np.flip(logits, tuple(k - 1 for k in axes))[:, *keep]
            _require_finite(kept)
            found = self.activation(kept)
            total = found if total is None else np.add(total, found, out=total)
        assert total is not None
        if len(self.members) > 1:
            member.engine.release()
        if len(every) > 1:
            total /= np.float32(len(every))
        return total


def _require_finite(logits: Float32) -> None:
    """Raise DataError for logits that are not finite: a mask of them means nothing, but may look like an empty one."""
    bad = sum(int(plane.size - np.isfinite(plane).sum()) for plane in np.moveaxis(logits, 1, 0))
    if bad:
        raise DataError(
            "the network's outputs are not finite",
            seen=f"{bad} of {logits.size} values are NaN or infinite",
            rule="finite weights, and intensities like those in training",
            hint="check the scan's intensities and the header's scaling; if all scans end like this, train the model "
            "again, with a lower train.learning_rate",
        )


def views(axes: Sequence[MirrorAxis]) -> list[tuple[int, ...]]:
    """For each view the axes of (1, C, D, H, W) to flip: every subset of `axes`. The first view is not flipped."""
    places = sorted({AXES[axis] for axis in axes})
    return [chosen for count in range(len(places) + 1) for chosen in combinations(places, count)]


def mirror_axes(mirror: Mirror, trained: Sequence[MirrorAxis], where: object) -> tuple[MirrorAxis, ...]:
    """The mirror axes for a model that was trained with flips along `trained`.

    Raises:
        DataError: the axes of the training are requested, but the training had no flips.
    """
    if mirror != "trained":
        return mirror
    if not trained:
        raise DataError(
            "was not trained with mirroring",
            where=str(where),
            seen="mirror_axes: none",
            rule="probabilities are averaged over flips that the training used",
            hint="do not mirror, train with train.augment.mirror_axes, or name the axes: --mirror height,width",
        )
    return tuple(trained)


def parse_mirror(text: str | None) -> Mirror:
    """`trained`, or axes such as `depth,height`; None: no mirroring.

    Raises:
        ConfigError: the text is something else.
    """
    if text is None:
        return ()
    if text == "trained":
        return "trained"
    named = text.split(",")
    axes = tuple(axis for axis in AXES if axis in named)
    if len(axes) != len(named):
        raise ConfigError(
            "does not name axes",
            where="--mirror",
            seen=text,
            rule=f"trained, or some of {','.join(AXES)}, each once",
            hint="e.g. --mirror depth,height",
        )
    return axes
