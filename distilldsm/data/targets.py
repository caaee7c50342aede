"""What a network's output channels stand for: classes that exclude each other, or regions that overlap.

Classes: a softmax; the most probable class wins. Regions (BraTS: whole tumour, tumour core, enhancing tumour): one
sigmoid per region. A region holds every voxel with a probability above one half. A mask is written region by region;
later regions replace earlier ones. This module needs numpy only, because prediction uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import ConfigError
from distilldsm.core.text import is_plain, one_line

Float32 = npt.NDArray[np.float32]
SHARES_LIMIT = 8
"""With at most this many classes, labels are warped as maps, and resampled voxels keep each class's share."""
LARGEST_NOT_TRIED = "not tried, as regions overlap and none contains all others"


@dataclass(frozen=True, kw_only=True)
class Region:
    """A union of labels that the network segments as one."""

    name: str
    values: tuple[int, ...]
    """Label values in the files that belong to the region."""
    written_as: int
    """Value in the mask for voxels of this region that are in no later region."""

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
    """How logits become labels, and which structures are evaluated.

    class_values: label values in the files, ascending from background 0. Class k is the value at position k.
    regions: in the order in which masks are written. If empty, the output channels are the classes.
    """

    class_names: tuple[str, ...]
    class_values: tuple[int, ...]
    regions: tuple[Region, ...] = ()

    def __post_init__(self) -> None:
        values = self.class_values
        if not all(0 <= value <= 255 for value in values) or len(set(values)) != len(values):
            raise ConfigError("impossible label values", seen=values, rule="different whole numbers from 0 to 255")
        for name in (*self.class_names, *(region.name for region in self.regions)):
            if not is_plain(name):
                raise ConfigError("a name holds control characters", seen=one_line(name), rule="one line of text")
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
        """Number of output channels of the network."""
        return len(self.regions) or len(self.class_names)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """The region or class of each output channel."""
        return tuple(region.name for region in self.regions) or self.class_names

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """The structures that are evaluated: name to label values in the files."""
        if self.regions:
            return {region.name: region.values for region in self.regions}
        return {name: (v,) for name, v in zip(self.class_names, self.class_values, strict=True) if v}

    @property
    def largest(self) -> dict[str, tuple[int, ...]]:
        """Structures of which post-processing may keep only the largest component: name to its values in a mask.

        Labels, and regions that share no label: each structure by itself. Regions that overlap: only the region that
        contains all others. A removed part becomes background in all of them, as in nnU-Net's first step for the whole
        foreground (Isensee et al., 2021). If no region contains all others, the result is empty: it would be unclear
        which label a removed part should get.
        """
        structures = self.structures
        listed = [value for values in structures.values() for value in values]
        if len(set(listed)) == len(listed):
            return structures
        outermost = [name for name, values in structures.items() if set(values) == set(listed)]
        return {name: structures[name] for name in outermost[:1]}

    @property
    def changed_with(self) -> dict[str, tuple[str, ...]]:
        """For each structure in `largest`: all structures that lose the voxels it loses, including itself."""
        return {
            name: tuple(other for other, own in self.structures.items() if set(own) & set(values))
            for name, values in self.largest.items()
        }

    def describe_regions(self) -> str:
        """Each region with its labels, e.g. `whole (core, shell); inner (core)`; empty without regions."""
        names = dict(zip(self.class_values, self.class_names, strict=True))
        return "; ".join(f"{region.name} ({', '.join(names[v] for v in region.values)})" for region in self.regions)

    def membership(self) -> npt.NDArray[np.bool_]:
        """(structures, classes): True if the class belongs to the structure."""
        return np.array([[value in values for value in self.class_values] for values in self.structures.values()])

    def probabilities(self, logits: Float32) -> Float32:
        """Probabilities (channels, ...) of logits (channels, ...): a softmax over classes, or a sigmoid per region."""
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
        """The same result as `classes`, directly from logits (channels, ...)."""
        # A sigmoid is above one half where its logit is above zero.
        return self.classes(logits + 0.5 if self.regions else logits)


def softmax(logits: Float32) -> Float32:
    """Softmax over the first axis."""
    shifted = logits - logits.max(axis=0, keepdims=True)
    np.exp(shifted, out=shifted)
    # Add class by class: numpy's sum uses another order for some shapes, and pieces must equal the whole volume.
    total = shifted[0].copy()
    for row in shifted[1:]:
        total += row
    shifted /= total
    return shifted


def sigmoid(logits: Float32) -> Float32:
    """1 / (1 + exp(-x)), without overflow. NaN stays NaN."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def regions_from_labels(wanted: Mapping[str, Sequence[str]], labels: Mapping[str, int]) -> tuple[Region, ...]:
    """Regions from names: {"WT": ["oedema", "core", "enhancing"], "TC": ["core", "enhancing"], "ET": ["enhancing"]}.

    Masks are written from the region with most labels to the one with fewest. Equal regions are sorted by name, because
    not every tool keeps the order of a mapping. A region is written as its one label that no later region holds.

    Raises:
        ConfigError: a label is unknown, or a region does not have exactly one label that no later region holds.
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
                rule="exactly one; later regions are those with fewer labels",
            )
        regions.append(Region(name=name, values=tuple(labels[m] for m in members), written_as=labels[left[0]]))
    return tuple(regions)
