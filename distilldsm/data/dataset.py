"""The index of a data set: cases, channels and labels. It is the same for every file layout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from distilldsm.config import Modality
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.mapping import from_mapping, to_mapping
from distilldsm.core.text import is_plain, one_line
from distilldsm.data.targets import Region

INDEX = "dataset_index.json"
SAMPLE_SOURCE = "embedded sample (MNI152 template)"
"""The `source` of the synthetic sample data set."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One labelled volume. Paths are relative to the data set's root, POSIX style."""

    id: str
    patient: str
    """Cases of one patient are all in training, or all held out."""
    images: tuple[str, ...]
    """One file per channel, or one 4-D file that holds all channels along its last axis."""
    label: str
    surplus: tuple[str, ...] = ()
    """Files of the original data set that are named like further channels of this case. They are not used."""

    def check_names(self) -> None:
        """Raise DataError if the id cannot be a file name (outputs use it as one), or a path leaves the data set."""
        if self.id in ("", ".", "..") or re.search(r"[/\\]", self.id) or not is_plain(self.id):
            rule = "no slash, no control character, not '.' or '..'"
            raise DataError("a case id cannot be a file name", seen=self.id, rule=rule)
        for path in (*self.images, self.label):
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\0" in path:
                raise DataError("an index names a file outside the data set", seen=path, rule="paths below its folder")


@dataclass(frozen=True, kw_only=True)
class Channel:
    name: str
    modality: Modality


def check_names(names: Iterable[str]) -> None:
    """Raise DataError if a name of a label, channel or data set is not one plain line."""
    for name in names:
        if not is_plain(name):
            raise DataError("a name holds control characters", seen=one_line(name), hint="rename it in the description")


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """The contents of `dataset_index.json` in the root of a downloaded data set."""

    schema_version: int = 1
    name: str
    channels: tuple[Channel, ...]
    labels: Mapping[str, int]
    """Label name to value in the files; background is 0."""
    regions: tuple[Region, ...] = ()
    """Overlapping unions of labels for the evaluation of this data set, in the order in which masks are written."""
    ignored_value: int | None = None
    """Value of nnU-Net's label `ignore`, if declared. Validation refuses masks that hold it."""
    cases: tuple[Case, ...]
    licence: str = "unknown"
    reference: str = "unknown"
    source: str = "unknown"
    """Origin of the data: sample, an address, or the last part of a path."""
    note: str = ""
    """Text that readers of every result must know, e.g. that all subjects come from one template."""
    layout: str = "msd"
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.cases:
            raise DataError("the data set has no labelled case")
        check_names((self.name, *self.labels, *(channel.name for channel in self.channels)))
        ids = [case.id for case in self.cases]
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise DataError("a case id appears twice", seen=twice)

    @property
    def class_values(self) -> tuple[int, ...]:
        """Label values in ascending order. Class k of a network has the value at position k."""
        return tuple(sorted(self.labels.values()))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Label names in the order of `class_values`."""
        return tuple(sorted(self.labels, key=lambda name: self.labels[name]))

    def save(self, root: str | os.PathLike[str]) -> None:
        write_json(Path(root) / INDEX, self)

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> DatasetIndex:
        path = Path(root) / INDEX
        try:
            index = from_mapping(cls, read_json(path), where=str(path))
            for case in index.cases:  # somebody may have edited the file
                case.check_names()
            return index
        except DataError as error:
            hint = error.hint or "run the download again (dvc repro download)"
            raise DataError(error.problem, where=path, seen=error.seen, rule=error.rule, hint=hint) from None

    def subset(self, ids: frozenset[str] | set[str]) -> DatasetIndex:
        """The same data set with only the named cases."""
        return replace(self, cases=tuple(case for case in self.cases if case.id in ids))

    def to_mapping(self) -> dict[str, object]:
        return to_mapping(self)
