"""Recognises the layout of a folder with labelled volumes, and makes its index."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from distilldsm.config import DownloadConfig, Modality, PatternConfig
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.data import descriptions
from distilldsm.data.archive import find_root, wrapped
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.data.patterns import Files, find_cases, limited, some
from distilldsm.data.targets import Region, regions_from_labels
from distilldsm.io.channel_names import without_channel

_BRATS_CHANNELS = ("flair", "t1", "t1ce", "t2")
_BRATS_LABELS = {"background": 0, "necrotic_core": 1, "oedema": 2, "enhancing_tumour": 4}
_BRATS_REGIONS = {
    "WT": ("necrotic_core", "oedema", "enhancing_tumour"),
    "TC": ("necrotic_core", "enhancing_tumour"),
    "ET": ("enhancing_tumour",),
}
"""The regions that BraTS scores: whole tumour, tumour core, enhancing tumour."""
_BRATS_TOP = "MICCAI_BraTS2020_TrainingData"
_SUFFIXES = (".nii.gz", ".nii")

Layout = Literal["msd", "nnunet", "brats2020", "pattern"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The facts about a data set that its layout and description give."""

    channels: tuple[Channel, ...]
    labels: Mapping[str, int]
    cases: Sequence[Files]
    name: str | None = None
    licence: str | None = None
    reference: str | None = None
    note: str | None = None
    regions: tuple[Region, ...] = ()
    ignored_value: int | None = None


def index_dataset(root: Path, config: DownloadConfig, *, source: str) -> DatasetIndex:
    """Make the index of the labelled cases below `root`. Its paths are relative to `root`.

    Args:
        root: an unpacked data set. If it holds only one folder, that folder is searched.
        config: layout, patient pattern, and facts that the data set does not state itself.
        source: origin of the data set, stored in the index.

    Raises:
        DataError: the layout is unknown, the description is wrong, or files are missing (the error counts all of them
            and names the first ones).
        ConfigError: `modalities` names a channel that the data set does not have.
    """
    layout: Layout
    layout, inner = recognise(root) if config.layout == "auto" else (config.layout, root)
    if layout == "pattern":
        assert config.pattern is not None  # the config checks it
        inner, found = _pattern(root, config.pattern)
    elif layout == "brats2020":
        inner = _brats_root(root) or inner
        found = _brats2020(inner)
    else:
        inner = find_root(root)
        found = (_msd if layout == "msd" else _nnunet)(inner)
    _check_files(inner, found.cases)
    surplus = _surplus_channels(inner, found.cases)
    prefix = inner.relative_to(root)
    return DatasetIndex(
        name=config.name or found.name or _name(inner.name if inner != root else source),
        channels=_with_modalities(found.channels, config.modalities),
        labels=found.labels,
        regions=found.regions,
        ignored_value=found.ignored_value,
        cases=tuple(
            Case(
                id=files.id,
                patient=_patient(files.id, config.patient_pattern),
                images=tuple((prefix / p).as_posix() for p in files.images),
                label=(prefix / files.label).as_posix(),
                surplus=tuple((prefix / p).as_posix() for p in surplus.get(files.id, ())),
            )
            for files in sorted(found.cases, key=lambda files: files.id)
        ),
        licence=config.licence or found.licence or "unknown",
        reference=config.reference or found.reference or "unknown",
        source=source,
        note=found.note or "",
        layout=layout,
    )


def needed_files(index: DatasetIndex) -> Sequence[str]:
    """All files the index names."""
    return sorted({path for case in index.cases for path in (*case.images, case.label)})


def recognise(root: Path) -> tuple[Layout, Path]:
    """The layout (`msd`, `nnunet` or `brats2020`) and its top folder.

    Raises:
        DataError: the folder has none of these layouts.
    """
    inner = find_root(root)
    description = inner / "dataset.json"
    if description.is_file():
        return ("nnunet" if "channel_names" in descriptions.read(description) else "msd"), inner
    brats = _brats_root(root)
    if brats is not None:
        return "brats2020", brats
    raise DataError(
        "the layout is not recognised",
        where=inner,
        seen="no dataset.json, no */*_seg.nii.gz with _flair, _t1, _t1ce or _t2 beside it",
        rule="Medical Segmentation Decathlon, nnU-Net raw, BraTS 2020, or your own pattern",
        hint="set download.layout: pattern and download.pattern (see docs/data.md)",
    )


def _check_files(root: Path, cases: Sequence[Files]) -> None:
    if not cases:
        raise DataError("holds no labelled case", where=root, hint="name the folder that holds the cases")
    missing = [path for files in cases for path in (*files.images, files.label) if not (root / path).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} file(s) of the data set are missing",
            where=root,
            seen=some(missing),
            hint="add the files, or remove these cases (also from dataset.json, if there is one)",
        )
    ids = [files.id for files in cases]
    twice = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise DataError("case ids appear twice", where=root, seen=some(twice), hint="give each case a unique name")


def _surplus_channels(root: Path, cases: Sequence[Files]) -> dict[str, list[str]]:
    """Case id to the files beside its images that are named like further channels of it."""
    used = {path for files in cases for path in (*files.images, files.label)}
    owners: dict[tuple[Path, str], str] = {}
    for files in cases:
        image = Path(files.images[0])
        name = without_channel(_stem(image.name))
        if name is not None and (image.parent, name) in owners:
            return {}  # the numbers are those of cases
        if name is not None:
            owners[image.parent, name] = files.id
    found: dict[str, list[str]] = {}
    for folder in sorted({parent for parent, _ in owners}):
        for path in sorted((root / folder).iterdir()):
            name = without_channel(_stem(path.name)) if path.name.endswith(_SUFFIXES) else None
            relative = (folder / path.name).as_posix()
            if name is not None and relative not in used and (folder, name) in owners:
                found.setdefault(owners[folder, name], []).append(relative)
    return found


def _with_modalities(channels: tuple[Channel, ...], wanted: Mapping[str, Modality]) -> tuple[Channel, ...]:
    names = [channel.name for channel in channels]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ConfigError(
            "no such channel in the data set",
            where="download.modalities",
            seen=unknown[0],
            rule="channels: " + ", ".join(names),
        )
    return tuple(Channel(name=c.name, modality=wanted.get(c.name, c.modality)) for c in channels)


def _numbered(description: Mapping[str, Any], key: str, path: Path) -> tuple[Channel, ...]:
    return descriptions.channels_of(descriptions.need(description, key, dict, path), path, key)


def _refuse_other_format(root: Path, description: Mapping[str, Any], layout: Layout) -> None:
    """Raise DataError if the description belongs to another format. Otherwise the error would be a missing key."""
    path = root / "dataset.json"
    if _is_first_nnunet(root, description):
        raise DataError(
            "has the format of nnU-Net's first version",
            where=path,
            seen="'modality', and images CASE_0000.nii.gz",
            rule="nnU-Net's second version names the channels in 'channel_names'",
            hint="rename 'modality' to 'channel_names', with download.layout: nnunet or auto",
        )
    own, other, layout_of_other = "modality", "channel_names", "nnunet"
    if layout == "nnunet":
        own, other, layout_of_other = other, own, "msd"
    if own not in description and other in description:
        raise DataError(
            f"is not a description of the layout {layout}",
            where=path,
            seen=f"'{other}'",
            rule=f"'{own}'",
            hint=f"set download.layout: {layout_of_other}, or auto",
        )


def _is_first_nnunet(root: Path, description: Mapping[str, Any]) -> bool:
    """Whether the description has the Decathlon's keys, but the files end with a channel number."""
    if "modality" not in description or "channel_names" in description:
        return False
    training = description.get("training")
    if not isinstance(training, list) or not training:
        return any((root / "imagesTr").glob("*_0000.nii*"))
    image = str(training[0].get("image")) if isinstance(training[0], dict) else ""
    numbered = root / "imagesTr" / f"{_stem(image)}_0000{_suffix(image)}"
    return numbered.is_file() and not (root / image).is_file()


def _msd(root: Path) -> Found:
    path = root / "dataset.json"
    description = descriptions.read(path)
    _refuse_other_format(root, description, "msd")
    channels = _numbered(description, "modality", path)
    cases = []
    for entry in descriptions.need(description, "training", list, path):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("image", "label")):
            raise DataError("each entry of 'training' names image and label", where=path, seen=repr(entry)[:100])
        image, label = (_inside(entry[k], path) for k in ("image", "label"))
        cases.append(Files(_stem(image), (image,), label))
    labels = descriptions.need(description, "labels", dict, path)
    return _described(description, path, channels=channels, labels=labels, cases=cases)


def _described(description: Mapping[str, Any], path: Path, *, labels: Mapping[str, Any], **found: Any) -> Found:
    """The facts in a `dataset.json`, together with the channels, cases and regions in `found`."""
    return Found(
        name=descriptions.text(description, "name"),
        labels=descriptions.labels_of(labels, path),
        ignored_value=descriptions.ignored_of(labels, path),
        licence=descriptions.text(description, "licence", "license"),
        reference=descriptions.text(description, "reference"),
        note=descriptions.text(description, "note"),
        **found,
    )


def _nnunet(root: Path) -> Found:
    path = root / "dataset.json"
    description = descriptions.read(path)
    _refuse_other_format(root, description, "nnunet")
    channels = _numbered(description, "channel_names", path)
    ending = str(description.get("file_ending", ".nii.gz"))
    if ending not in _SUFFIXES:
        raise DataError(
            "only NIfTI files can be read", where=path, seen=f"file_ending {ending}", rule=", ".join(_SUFFIXES)
        )
    # Ids come from the images of all channels and from the labels, so that a missing file is reported.
    ids = {name[: -len("_0000")] for name in _stems(root / "imagesTr", ending) if re.search(r"._\d{4}\Z", name)}
    ids |= set(_stems(root / "labelsTr", ending))
    cases = [
        Files(name, tuple(f"imagesTr/{name}_{k:04d}{ending}" for k in range(len(channels))), f"labelsTr/{name}{ending}")
        for name in sorted(ids)
    ]
    _check_files(root, cases)
    listed = description.get("numTraining")
    if isinstance(listed, int) and listed != len(cases):
        raise DataError(
            "'numTraining' is not the number of cases",
            where=path,
            seen=f"{listed}, and {len(cases)} in imagesTr and labelsTr",
            hint="complete the data set, or correct numTraining",
        )
    labels, regions = descriptions.split_regions(
        descriptions.need(description, "labels", dict, path), description, path
    )
    return _described(description, path, channels=channels, labels=labels, cases=cases, regions=regions)


def _stems(folder: Path, ending: str) -> list[str]:
    names = [p.name for p in folder.glob(f"*{ending}") if not p.name.startswith(".")]
    return [name.removesuffix(ending) for name in names]


def _brats_root(root: Path) -> Path | None:
    """The folder that holds the BraTS cases: one of `wrapped`, or the folder `_BRATS_TOP` in one of them."""
    folders = list(wrapped(root))
    folders += [folder / _BRATS_TOP for folder in folders if (folder / _BRATS_TOP).is_dir()]
    return next((folder for folder in folders if _holds_brats(folder)), None)


def _holds_brats(root: Path) -> bool:
    """Whether a case has a modality beside its label. Names such as `masks/CASE_seg.nii.gz` alone prove nothing."""
    for label in root.glob("*/*_seg.nii*"):
        case = label.name.rpartition("_seg.nii")[0]
        beside = [case + f"_{channel}{suffix}" for channel in _BRATS_CHANNELS for suffix in _SUFFIXES]
        if not label.name.startswith(".") and any((label.parent / name).is_file() for name in beside):
            return True
    return False


def _brats2020(root: Path) -> Found:
    cases = []
    for folder in sorted({p.parent for kind in ("flair", "seg") for p in root.glob(f"*/*_{kind}.nii*")}):
        files = [p.name for p in sorted(folder.iterdir()) if p.name.endswith(_SUFFIXES) and p.name[0] != "."]
        anchor = next((name for name in files if re.search(r"_(flair|seg)\.nii", name)), None)
        if anchor is None:
            continue  # litter only
        name, suffix = re.sub(r"_(flair|seg)\.nii.*", "", anchor), _suffix(anchor)
        label = f"{name}_seg{suffix}"
        if label not in files:
            # In the published data set, the label of case 355 has another name, *_Segm.nii.
            label = next((other for other in files if re.search(r"_Segm\.nii", other)), label)
        images = tuple(f"{folder.name}/{name}_{c}{suffix}" for c in _BRATS_CHANNELS)
        cases.append(Files(name, images, f"{folder.name}/{label}"))
    return Found(
        name="BraTS2020",
        channels=tuple(Channel(name=c, modality="MRI") for c in _BRATS_CHANNELS),
        labels=dict(_BRATS_LABELS),
        regions=regions_from_labels(_BRATS_REGIONS, _BRATS_LABELS),
        cases=cases,
        licence="BraTS 2020 data usage agreement (registration)",
        reference="Menze et al. 2015; Bakas et al. 2017, 2018",
    )


def _pattern(root: Path, pattern: PatternConfig) -> tuple[Path, Found]:
    inner, cases = find_cases(root, pattern)
    channels = tuple(Channel(name=name, modality=modality) for name, modality in pattern.channels.items())
    return inner, Found(channels=channels, labels=dict(pattern.labels), cases=cases)


def _inside(name: str, path: Path) -> str:
    inner = PurePosixPath(name)
    if inner.is_absolute() or ".." in inner.parts or "\0" in name:
        raise DataError("names a file outside the data set", where=path, seen=name)
    return inner.as_posix()


def _stem(name: str) -> str:
    base = name.rsplit("/", 1)[-1]
    return base.removesuffix(_suffix(base))


def _suffix(name: str) -> str:
    return next((s for s in _SUFFIXES if name.endswith(s)), "")


def _name(source: str) -> str:
    """The data set's name, from its folder or from the last part of its source."""
    base = source.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"^Dataset\d+_|\.(tar(\.\w+)?|tgz|tbz2|txz|zip)$", "", base) or "data set"


def _patient(case: str, pattern: str | None) -> str:
    if pattern is None:
        return case
    with limited(pattern, case):
        match = re.search(pattern, case)
    if not match or not match[1]:
        raise DataError(
            "the patient cannot be told from a case id",
            where="download.patient_pattern",
            seen=case,
            rule=pattern,
            hint="correct the pattern; cases of one patient must stay together in every split",
        )
    return match[1]
