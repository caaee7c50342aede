"""Finds the scans that the arguments of `distilldsm predict` name, and their output files."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.text import one_line
from distilldsm.io import formats
from distilldsm.io.dicom import why_no_scan
from distilldsm.io.dicom_slice import HARMLESS_ENDINGS, HARMLESS_NAMES, visible_files
from distilldsm.io.errors import damaged
from distilldsm.io.formats import (
    Format,
    format_of,
    is_scan_file,
    is_series,
    read_file,
    read_scan,
    stem,
    unknown_format,
)
from distilldsm.io.scan import Scan, Skipped, check_size

_MASK = re.compile(r"^(?P<case>.+)_(seg|segmentation|mask|labels?|gt)$", re.IGNORECASE)
_NO_SCANS = (*HARMLESS_ENDINGS, ".tsv", ".bval", ".bvec", ".yaml", ".yml")
"""Endings, in lower case, of files beside scans that need no line. Any other file that is left out gets one."""
_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True)
class Input:
    """One scan: its name, and its files or series folders."""

    name: str
    paths: tuple[Path, ...]

    @property
    def format(self) -> Format:
        """The format of the first file. For a file that cannot be read, which `read` reports, the first format."""
        return format_of(self.paths[0]) or formats.FORMATS[0]

    def read(
        self, channels: int, limit_bytes: float = float("inf"), names: Sequence[str] = (), *, bytes_per_voxel: float = 1
    ) -> Scan:
        """Read the scan. It may take `limit_bytes` of memory, see `check_size`; `names` are the model's channels.

        Raises:
            DataError: see `read_scan` and `Scan.load`.
        """
        scan = read_scan(self.paths, channels, names=names)
        check_size([scan], limit_bytes, bytes_per_voxel)
        return scan.load()


class Inputs(NamedTuple):
    """What the arguments name."""

    scans: list[Input]
    """Sorted by name."""
    many: bool
    """The output is a directory: there are several scans, or a folder of scans is named."""
    skipped: list[Skipped]
    """Files and series in named folders that are left out."""


def tell_on_stderr(remark: str) -> None:
    """Print a remark to stderr, apart from the command's output."""
    print(one_line(remark), file=sys.stderr)


def find_inputs(
    arguments: Sequence[Path],
    channels: int,
    names: Sequence[str] = (),
    tell: Callable[[str], object] = tell_on_stderr,
) -> Inputs:
    """Find the scans that the arguments name. In folders, masks such as `CASE_seg.nii.gz` are left out.

    A folder is searched with all folders in it that are not hidden. If it holds NIfTI files itself, those in folders
    below (its masks, often) are left out. Files that should be scans but cannot be read are among the scans; reading
    them reports the error.

    Args:
        arguments: files and folders.
        channels: number of channels of the model.
        names: names of the channels. With several, the files `CASE_<name>.nii.gz`, in any order, are one scan, and
            other files of that case (its `_seg`) are left out, with a line. BraTS is laid out in this way.
        tell: called with remarks about what is left out, and about files that the user may have meant differently.

    Raises:
        DataError: a path does not exist, or holds nothing to predict.
        ConfigError: two scans have one name, or the channel numbers in the file names have another order.
    """
    files: list[Path] = []
    series: list[Path] = []
    found: list[Input] = []
    skipped: list[Skipped] = []
    many = False
    for path in arguments:
        if not path.exists():
            raise DataError("file not found", where=path)
        if not path.is_dir():
            files.append(path)
            continue
        nifti, folders, others = _look_into(path)
        scans, masks = _without_masks(_by_channel_name(nifti, names) or _group(nifti, channels))
        masks += _of_no_channel(nifti, scans, masks)
        _tell_left_out(path, masks + others, tell)
        skipped += masks + others
        if folders == [path] and not nifti:
            series.append(path)
            continue
        found += scans + [Input(_series_name(folder, path), (folder,)) for folder in folders]
        many = True
    single = _by_channel_name(files, names) or _files(files, channels)
    surplus = _of_no_channel(files, single, [])
    if surplus:
        _tell_left_out(surplus[0].path.parent, surplus, tell)
    found += _series(series, channels) + single
    skipped += surplus
    many = many or len(found) > 1
    named: dict[str, Input] = {}
    for one in found:
        if one.name in named:
            raise ConfigError(
                f"two scans are called '{one.name}'",
                where=one.paths[0],
                seen=str(named[one.name].paths[0]),
                rule="one output file per name",
                hint="name only the folder of the scans, predict them one by one, or rename one",
            )
        named[one.name] = one
    if channels == 1:
        _remark_on_channels(found, tell)
    return Inputs(sorted(found, key=lambda one: one.name), many, skipped)


def _series(folders: Sequence[Path], channels: int) -> list[Input]:
    if channels > 1 and len(folders) == channels:
        return [Input(folders[0].resolve().name, tuple(folders))]
    return [Input(folder.resolve().name, (folder,)) for folder in folders]


def _files(files: Sequence[Path], channels: int) -> list[Input]:
    """Scans from single files: one scan per file. With several channels: files named as in nnU-Net, or one scan."""
    for path in files:
        if not is_scan_file(path) and format_of(path) is None:
            raise unknown_format(path)
    if channels == 1:
        return [Input(stem(path), (path,)) for path in files]
    if not files:
        return []
    if all(_CHANNEL.match(stem(path)) for path in files) and len({_key(path) for path in files}) > 1:
        return _group(files, channels)
    if len(files) > 1 and not all(_has_channels(path) for path in files):
        _refuse_other_order(files)
        return [Input(stem(files[0]), tuple(files))]
    return [Input(stem(path), (path,)) for path in files]


def _refuse_other_order(files: Sequence[Path]) -> None:
    """Raise ConfigError if the channel numbers in the file names of one scan are not in order."""
    numbers = [match["channel"] for path in files if (match := _CHANNEL.match(stem(path)))]
    if len(numbers) == len(files) and numbers != sorted(numbers):
        right = [path for _, path in sorted(zip(numbers, files, strict=True))]
        raise ConfigError(
            "the order of the channels does not match their names",
            where=files[0].parent,
            seen=" ".join(path.name for path in files),
            rule="_0000, _0001, ...: the model's order",
            hint="give " + " ".join(map(str, right)),
        )


def _has_channels(path: Path) -> bool:
    try:
        return len(read_file(path).channels) > 1
    except UserError:
        return False


def _key(path: Path) -> tuple[Path, str]:
    match = _CHANNEL.match(stem(path))
    return path.parent, match["case"] if match else stem(path)


def _group(files: Sequence[Path], channels: int) -> list[Input]:
    """Group the files of a folder: `case_0000.nii.gz`, `case_0001.nii.gz` ... are one scan. Any other file is one scan.

    For a model of one channel, `case_0000.nii.gz` is a scan named `case` if there is no `case_0001`.
    """
    cases: dict[tuple[Path, str], list[Path]] = {}
    for path in sorted(files):
        cases.setdefault(_key(path), []).append(path)
    out = []
    for (_, name), members in cases.items():
        if channels == 1 and len(members) > 1:
            out += [Input(stem(path), (path,)) for path in members]
        else:
            out.append(Input(name, tuple(members)))
    return out


def _without_masks(found: list[Input]) -> tuple[list[Input], list[Skipped]]:
    """The scans without masks, e.g. without `CASE_seg` if there is a scan `CASE`; and the masks."""
    cases = {name for one in found for name in (one.name, _key(one.paths[0])[1])}

    def is_mask(one: Input) -> bool:
        match = _MASK.match(one.name)
        numbered = _CHANNEL.match(stem(one.paths[0]))  # a channel number marks an image
        return match is not None and match["case"] in cases and not numbered

    masks = [Skipped(path, "named like a mask") for one in found if is_mask(one) for path in one.paths]
    return [one for one in found if not is_mask(one)], masks


def _of_no_channel(files: Sequence[Path], scans: Sequence[Input], masks: Sequence[Skipped]) -> list[Skipped]:
    """The files that are part of no scan, because their names end with none of the model's channels."""
    known = {path for one in scans for path in one.paths} | {one.path for one in masks}
    return [Skipped(path, "named like no channel") for path in files if path not in known]


def _tell_left_out(folder: Path, skipped: Sequence[Skipped], tell: Callable[[str], object]) -> None:
    for reason in dict.fromkeys(one.reason for one in skipped):
        tell(f"{folder}: left out ({reason}): {listed([one.path.name for one in skipped if one.reason == reason])}")


def _remark_on_channels(found: Sequence[Input], tell: Callable[[str], object]) -> None:
    """Remark that `CASE_0001` beside `CASE_0000` is read as a separate scan."""
    cases: dict[tuple[Path, str], list[Path]] = {}
    for path in sorted(one.paths[0] for one in found):
        if _CHANNEL.match(stem(path)):
            cases.setdefault(_key(path), []).append(path)
    further = [stem(path) for members in cases.values() for path in members[1:]]
    if further:
        tell(f"named like further channels, but the model has one channel; each is read as a scan: {listed(further)}")


def listed(names: Sequence[str], shown: int = 3) -> str:
    """The first names as text, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _by_channel_name(files: Sequence[Path], names: Sequence[str]) -> list[Input]:
    """Scans from files that end in the channels' names; an empty list if the files are named in another way.

    If a case lacks a file, or has two of one channel, all its files stay. Reading the case then reports the error.
    """
    if len(names) < 2:
        return []
    cases: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    for path in files:
        for name in names:
            if stem(path).lower().endswith(f"_{name.lower()}"):
                channels = cases.setdefault((path.parent, stem(path)[: -len(name) - 1]), {})
                channels.setdefault(name, []).append(path)
    if not any(len(found) == len(names) for found in cases.values()):
        return []
    if any(all(f.parent != folder or not f.name.startswith(f"{case}_") for folder, case in cases) for f in files):
        return []
    return [
        Input(case, tuple(path for name in names for path in found.get(name, ()))) for (_, case), found in cases.items()
    ]


def _look_into(folder: Path) -> tuple[list[Path], list[Path], list[Skipped]]:
    """Scan files in a folder and below it, series folders, and what is left out.

    Raises:
        DataError: there are none, a folder cannot be read, or one folder holds NIfTI and DICOM files.
    """
    scans: list[Path] = []
    folders: list[Path] = []
    skipped: list[Skipped] = []
    for here in _folders(folder):
        files = visible_files(here)
        mine = [path for path in files if is_scan_file(path)]
        broken = [path for path in files if path.is_symlink() and not path.exists() and path not in mine]
        if is_series(here):
            if mine:
                raise DataError("holds NIfTI and DICOM files", where=here, rule="one kind", hint="name them one by one")
            folders.append(here)
            continue
        if here != folder and any(path.parent == folder for path in scans):
            skipped += [Skipped(path, "in a folder beside scans") for path in mine + broken]
        else:
            scans += mine + broken
        known = {*mine, *broken}
        skipped += [
            Skipped(path, "another format or ending")
            for path in files
            if path not in known
            and path.name.lower() not in HARMLESS_NAMES
            and not path.name.lower().endswith(_NO_SCANS)
        ]
    if folders != [folder] or scans:
        reasons = {one: why_no_scan(one) for one in folders}
        skipped += [Skipped(one, reason) for one, reason in reasons.items() if reason]
        folders = [one for one, reason in reasons.items() if not reason]
    if not scans and not folders:
        error = unknown_format(folder)
        left_out = listed([f"{one.path.name} ({one.reason})" for one in skipped]) if skipped else None
        raise DataError(error.problem, where=folder, seen=left_out, rule=error.rule)
    return scans, folders, skipped


def _folders(top: Path) -> Iterator[Path]:
    """A folder and all visible folders below it, sorted. Links are followed; each folder counts once."""

    def refuse(error: OSError) -> None:
        raise damaged(Path(error.filename), error)

    known = set()
    for name, inner, _ in os.walk(top, followlinks=True, onerror=refuse):
        inner[:] = sorted(one for one in inner if not one.startswith("."))
        real = os.path.realpath(name)
        if real in known:
            inner.clear()
            continue
        known.add(real)
        yield Path(name)


def _series_name(folder: Path, root: Path) -> str:
    parts = folder.relative_to(root).parts
    return "_".join(parts) if parts else root.resolve().name


def output_path(one: Input, output: Path, many: bool, chosen: str | None) -> tuple[Path, Format]:
    """Path and format of a scan's mask. The format is `chosen`, else that of the file name, else that of the input.

    Args:
        chosen: the name of a mask format.
    """
    wanted = next((kind for kind in formats.FORMATS if kind.mask_format == chosen), None)
    if many:
        kind = wanted or one.format
        return output / f"{one.name}{kind.mask_endings[0]}", kind
    named = next((kind for kind in formats.FORMATS if output.name.endswith(kind.mask_endings)), None)
    return output, wanted or named or one.format


def check_output(one: Input, path: Path, kind: Format, inputs: Sequence[Path]) -> None:
    """Refuse an output path that cannot be written or would overwrite an input.

    Raises:
        ConfigError: names the path, the rule and the hint.
    """
    if not (kind.mask_of_any_scan or kind is one.format):
        raise ConfigError(
            "DICOM SEG needs a DICOM series to refer to", where=one.paths[0], hint="write NIfTI: -o MASK.nii.gz"
        )
    endings = " or ".join(reversed(kind.mask_endings))
    if not path.name.endswith(kind.mask_endings) or path.name.startswith(kind.mask_endings):
        raise ConfigError(
            f"is not a {'NIfTI' if kind.name == 'nifti' else 'DICOM'} file name",
            where=path,
            rule=f"ends with {endings}",
            hint="rename it",
        )
    if path.is_dir():
        raise ConfigError("is a directory", where=path, rule=f"a file name ending with {endings}")
    refuse_input(path, inputs, "is the scan itself")


def refuse_input(path: Path, inputs: Sequence[Path], problem: str) -> None:
    """Raise ConfigError if writing `path` would overwrite one of the inputs, or a file in one of their folders."""
    for given in inputs:
        # samefile follows links; resolve also covers paths that do not exist.
        same = path.samefile(given) if path.exists() and given.exists() else path.resolve() == given.resolve()
        if not same and given.is_dir() and path.exists():
            same = any(path.samefile(file) for file in given.iterdir() if file.is_file())
        if same:
            raise ConfigError(problem, where=path, hint="give the output another name")
