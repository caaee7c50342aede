"""Class probabilities of a piece of an image: of one network or several, as it is or mirrored too, averaged.

The one place where logits become probabilities.
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
"""Axes to mirror along: those of the training, or these."""
Box = tuple[slice, slice, slice]
"""A part of (D, H, W)."""
Run = Callable[[Engine, Float32], Float32]
"""How an engine goes over a piece: (1, C, D, H, W) to logits (K, D, H, W)."""

AXES: dict[MirrorAxis, int] = {"depth": 2, "height": 3, "width": 4}
"""Axis to its place in (1, C, D, H, W)."""
WHOLE: Box = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Member:
    """A network, and the axes that its probabilities are averaged over the flips of."""

    engine: Engine
    mirror_axes: tuple[MirrorAxis, ...] = ()


class Ensemble:
    """Probabilities as the mean over the members, each the mean over its 2^axes mirrored views.

    Args:
        members: of one task: the same channels in, the same classes out, the same stride. With several, each gives its
            memory back after its turn.
        activation: logits (K, D, H, W) to probabilities, voxel by voxel.
    """

    def __init__(self, members: Sequence[Member], *, activation: Callable[[Float32], Float32] = softmax) -> None:
        self.members = tuple(members)
        self.activation = activation
        self.stride = members[0].engine.stride

    @property
    def depth_halo(self) -> int | None:
        """The longest of all networks; None where the logits of one depend on the whole depth."""
        halos = [member.engine.depth_halo for member in self.members]
        known = [halo for halo in halos if halo is not None]
        return max(known) if len(known) == len(halos) else None

    @property
    def mirrored(self) -> bool:
        """Whether any member looks at mirrored views."""
        return any(member.mirror_axes for member in self.members)

    @property
    def _streamable(self) -> Engine | None:
        """The engine, where there is one that sees the image as it is: only then probabilities can be streamed.

        Of several networks or mirrored views, each would have features of its own to keep.
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
        """Give back the memory of all networks; the next call takes it again."""
        for member in self.members:
            member.engine.release()

    def __call__(self, piece: Float32, keep: Box = WHOLE, run: Run = lambda engine, piece: engine(piece)[0]) -> Float32:
        """Probabilities (K, d, h, w) of the part `keep` of a piece (1, C, D, H, W).

        The piece is mirrored as a whole, with padding and halo: a slice sees the same neighbours from the other side,
        so that pieces still give the probabilities of the volume.
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
            found = self.activation(np.flip(logits, tuple(k - 1 for k in axes))[:, *keep])
            total = found if total is None else np.add(total, found, out=total)
        assert total is not None
        if len(self.members) > 1:
            member.engine.release()
        if len(every) > 1:
            total /= np.float32(len(every))
        return total


def views(axes: Sequence[MirrorAxis]) -> list[tuple[int, ...]]:
    """The axes of (1, C, D, H, W) to flip for each view, the image as it is first: every subset of `axes`."""
    places = sorted({AXES[axis] for axis in axes})
    return [chosen for count in range(len(places) + 1) for chosen in combinations(places, count)]


def mirror_axes(mirror: Mirror, trained: Sequence[MirrorAxis], where: object) -> tuple[MirrorAxis, ...]:
    """The axes to mirror along for a model that was trained with flips of the axes `trained`.

    Raises:
        DataError: those of the training are wanted, and it had none.
    """
    if mirror != "trained":
        return mirror
    if not trained:
        raise DataError(
            "was not trained with mirroring",
            where=str(where),
            seen="mirror_axes: none",
            rule="probabilities are averaged over flips that the network has seen",
            hint="leave mirroring out, train with train.augment.mirror_axes, or name the axes: --mirror height,width",
        )
    return tuple(trained)


def parse_mirror(text: str | None) -> Mirror:
    """`trained`, or axes such as `depth,height`; None: no mirroring.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return ()
    if text == "trained":
        return "trained"
    named = text.split(",")
    axes = tuple(axis for axis in AXES if axis in named)
    if len(axes) != len(named):
        raise ConfigError(
            "names no axes",
            where="--mirror",
            seen=text,
            rule=f"trained, or some of {','.join(AXES)}, each once",
            hint="e.g. --mirror depth,height",
        )
    return axes
