"""Class scores of a piece of an image: of one network or several, as it is or mirrored too, averaged.

The one place where logits become scores; both the prediction in memory and the one in pieces go through it.
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
from distilldsm.inference.engines import Engine, release
from distilldsm.inference.windows import WHOLE, Box, Run

Float32 = npt.NDArray[np.float32]
Mirror = Literal["trained"] | tuple[MirrorAxis, ...]
"""Axes to mirror along: those of the training, or these."""

AXES: dict[MirrorAxis, int] = {"depth": 2, "height": 3, "width": 4}
"""Axis to its place in (1, C, D, H, W)."""


@dataclass(frozen=True)
class Member:
    """A network, and the axes that its scores are averaged over the flips of."""

    engine: Engine
    mirror_axes: tuple[MirrorAxis, ...] = ()


class Scorer:
    """Scores as the mean over the members, each the mean over its 2^axes mirrored views.

    Args:
        members: of one task: the same channels in, the same classes out. With several, each gives its memory back after
            its turn.
        activation: logits (K, D, H, W) to scores, voxel by voxel.
    """

    def __init__(self, members: Sequence[Member], *, activation: Callable[[Float32], Float32] = softmax) -> None:
        self.members = tuple(members)
        self.activation = activation

    @property
    def mirrored(self) -> bool:
        """Whether any member looks at mirrored views."""
        return any(member.mirror_axes for member in self.members)

    @property
    def single(self) -> Engine | None:
        """The engine, where there is one that sees the image as it is: only then scores can be streamed.

        Of several networks or mirrored views, each would have features of its own to keep.
        """
        member = self.members[0]
        return member.engine if len(self.members) == 1 and not member.mirror_axes else None

    def release(self) -> None:
        """Give back the memory of all networks; the next call takes it again."""
        for member in self.members:
            release(member.engine)

    def __call__(self, piece: Float32, keep: Box = WHOLE, run: Run = lambda engine, piece: engine(piece)[0]) -> Float32:
        """Scores (K, d, h, w) of the part `keep` of a piece (1, C, D, H, W).

        The piece is mirrored as a whole, with padding and halo: a slice sees the same neighbours from the other side,
        so that pieces still give the scores of the volume.
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
            scores = self.activation(np.flip(logits, tuple(k - 1 for k in axes))[:, *keep])
            total = scores if total is None else np.add(total, scores, out=total)
        assert total is not None
        if len(self.members) > 1:
            release(member.engine)
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
            seen="mirror_axes: none (a model from before they were written down says none too)",
            rule="scores are averaged over flips that the network has seen",
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
