"""What a network's output channels stand for: classes that exclude each other, or regions that overlap.

Classes: softmax, the most probable one wins. Regions (BraTS: whole tumour, tumour core, enhancing tumour): one
sigmoid each; a region holds every voxel above one half, and a mask is written region by region, later ones over
earlier ones. Needs numpy only: prediction uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import ConfigError

Float32 = npt.NDArray[np.float32]
LARGEST_NOT_TRIED = "not tried, as regions overlap and none contains all others"


@dataclass(frozen=True, kw_only=True)
class Region:
    """A union of labels that the network segments as one."""

    name: str
    values: tuple[int, ...]
    """Label values in the files that belong to it."""
    written_as: int
    """The label value a mask holds where this region, and no later one, was found."""

    def __post_init__(self) -> None:
        if not self.values or 0 in self.values or len(set(self.values)) != len(self.values):
            raise ConfigError(
                f"region '{self.name}' has impossible labels", seen=self.values, rule="distinct values, not background"
            )
        if self.written_as not in self.values:
            raise ConfigError(
                f"region '{self.name}' is written as a label outside it",
                seen=self.written_as,
                rule=f"one of {self.values}",
            )


@dataclass(frozen=True)
class Targets:
    """How logits become labels, and which structures are scored.

    class_values: label values in the files, ascending from background 0; a class is a position in it.
    regions: in the order of writing; empty: the output channels are the classes.
    """

    class_names: tuple[str, ...]
    class_values: tuple[int, ...]
    regions: tuple[Region, ...] = ()

    def __post_init__(self) -> None:
        for region in self.regions:
            unknown = sorted(set(region.values) - set(self.class_values))
            if unknown:
                raise ConfigError(
                    f"region '{region.name}' names labels that the data set does not have",
                    seen=unknown,
                    rule=f"of {list(self.class_values)}",
                )
        names = [region.name for region in self.regions]
        if len(set(names)) != len(names):
            raise ConfigError("two regions have one name", seen=", ".join(names))

    @property
    def channels(self) -> int:
        """Output channels of the network."""
        return len(self.regions) or len(self.class_names)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """What each output channel stands for."""
        return tuple(region.name for region in self.regions) or self.class_names

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """What is scored: name to label values in the files."""
        if self.regions:
            return {region.name: region.values for region in self.regions}
        return {name: (v,) for name, v in zip(self.class_names, self.class_values, strict=True) if v}

    @property
    def largest(self) -> dict[str, tuple[int, ...]]:
        """Of what post-processing may keep the largest connected component only: structure to its values in a mask.

        Labels, and regions that share no label: each by itself. Of regions that overlap: the one that contains all
        others; what is cut off it becomes background in all of them, as in the first step of nnU-Net (Isensee et al.,
        2021), the whole foreground's. Where none does, nothing: of a part that is cut off one region, another one
        would have to say what it becomes.
        """
        structures = self.structures
        listed = [value for values in structures.values() for value in values]
        if len(set(listed)) == len(listed):
            return structures
        outermost = [name for name, values in structures.items() if set(values) == set(listed)]
        return {name: structures[name] for name in outermost[:1]}

    @property
    def changed_with(self) -> dict[str, tuple[str, ...]]:
        """Of each key of `largest` the structures that lose what it loses, itself among them."""
        return {
            name: tuple(other for other, own in self.structures.items() if set(own) & set(values))
            for name, values in self.largest.items()
        }

    def describe_regions(self) -> str:
        """Each region with its labels, e.g. `whole (core, shell); inner (core)`; empty where there are none."""
        names = dict(zip(self.class_values, self.class_names, strict=True))
        return "; ".join(f"{region.name} ({', '.join(names[v] for v in region.values)})" for region in self.regions)

    def membership(self) -> npt.NDArray[np.bool_]:
        """(structures, classes): which class belongs to which structure."""
        return np.array([[value in values for value in self.class_values] for values in self.structures.values()])

    def probabilities(self, logits: Float32) -> Float32:
        """Probabilities (channels, ...) of logits (channels, ...): softmax over the classes, or a sigmoid a region."""
        return sigmoid(logits) if self.regions else softmax(logits)

    def classes(self, probabilities: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        """Classes (...) of probabilities (channels, ...)."""
        if not self.regions:
            return probabilities.argmax(axis=0).astype(np.uint8)
        found = np.zeros(probabilities.shape[1:], dtype=np.uint8)
        for region, probability in zip(self.regions, probabilities, strict=True):
            found[probability > 0.5] = self.class_values.index(region.written_as)
        return found

    def classes_of_logits(self, logits: Float32) -> npt.NDArray[np.uint8]:
        """As `classes`, without the way over probabilities."""
        # A sigmoid is above one half where its logit is above zero.
        return self.classes(logits + 0.5 if self.regions else logits)


def softmax(logits: Float32) -> Float32:
    """Softmax over the first axis."""
    shifted = logits - logits.max(axis=0, keepdims=True)
    np.exp(shifted, out=shifted)
    # Added up class by class: numpy's own sum takes another order for some shapes, and pieces must equal the whole.
    total = shifted[0].copy()
    for row in shifted[1:]:
        total += row
    shifted /= total
    return shifted


def sigmoid(logits: Float32) -> Float32:
    """1 / (1 + exp(-x)), without overflow; values that are not finite stay so."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def regions_from_labels(wanted: Mapping[str, Sequence[str]], labels: Mapping[str, int]) -> tuple[Region, ...]:
    """Regions from names: {"WT": ["oedema", "core", "enhancing"], "TC": ["core", "enhancing"], "ET": ["enhancing"]}.

    Masks are written from the region of most labels to that of fewest (equal ones by name: what a mapping holds has no
    order everywhere parameters travel). A region is written as the one label of it that no later region holds.

    Raises:
        ConfigError: an unknown label, or a region of which no label, or more than one, is left.
    """
    regions = []
    items = sorted(wanted.items(), key=lambda item: (-len(item[1]), item[0]))
    for position, (name, members) in enumerate(items):
        for member in members:
            if not labels.get(member):
                raise ConfigError(
                    f"region '{name}' names an unknown label",
                    where="preprocess.regions",
                    seen=repr(member),
                    rule="one of " + ", ".join(label for label, value in labels.items() if value),
                )
        later = {member for _, others in items[position + 1 :] for member in others}
        left = [member for member in members if member not in later]
        if len(left) != 1:
            raise ConfigError(
                f"region '{name}' cannot be written into a mask",
                where="preprocess.regions",
                seen=f"labels that no later region holds: {', '.join(left) or 'none'}",
                rule="exactly one, where later regions are those of fewer labels",
            )
        regions.append(Region(name=name, values=tuple(labels[m] for m in members), written_as=labels[left[0]]))
    return tuple(regions)
