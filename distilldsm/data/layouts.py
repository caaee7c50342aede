"""Recognising how a folder of labelled volumes is laid out, and making its index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilldsm.config import DownloadConfig, Modality, PatternConfig
from distilldsm.data.archive import find_root
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.errors import DataError

_BRATS_CHANNELS = ("flair", "t1", "t1ce", "t2")
_BRATS_LABELS = {"background": 0, "necrotic_core": 1, "oedema": 2, "enhancing_tumour": 4}
_SUFFIXES = (".nii.gz", ".nii")


def index_dataset(root: Path, config: DownloadConfig, *, source: str) -> DatasetIndex:
    """Index the labelled cases below `root`, whose paths the index names relative to it.

    Args:
        root: an unpacked data set; a single folder inside it is looked into.
        config: layout, patient pattern and what the data set does not say itself.
        source: where it came from, for the index.

    Raises:
        DataError: no known layout, a broken description, or files that are missing (all of them are named).
    """
    inner = find_root(root)
    layout = config.layout if config.layout != "auto" else recognise(inner)
    if layout == "pattern":
        assert config.pattern is not None  # the config checks it
        found = _pattern(inner, config.pattern)
    else:
        found = {"msd": _msd, "nnunet": _nnunet, "brats2020": _brats2020}[layout](inner)
    prefix = inner.relative_to(root)
    missing = [path for case in found["cases"] for path in (*case[1], case[2]) if not (inner / path).is_file()]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise DataError(
            f"{len(missing)} file(s) of the data set are missing",
            where=inner,
            seen=", ".join(missing[:10]) + more,
            mend="complete the data set, or take these cases out of its dataset.json",
        )
    if not found["cases"]:
        raise DataError("holds no labelled case", where=inner, rule=f"layout {layout}")
    return DatasetIndex(
        name=config.name or found.get("name") or inner.name,
        channels=tuple(
            Channel(name=name, modality=config.modalities.get(name, modality))
            for name, modality in found["channels"].items()
        ),
        labels=found["labels"],
        cases=tuple(
            Case(
                id=name,
                patient=_patient(name, config.patient_pattern),
                images=tuple((prefix / p).as_posix() for p in images),
                label=(prefix / label).as_posix(),
            )
            for name, images, label in sorted(found["cases"])
        ),
        licence=config.licence or found.get("licence") or "unknown",
        reference=config.reference or found.get("reference") or "unknown",
        source=source,
        note=found.get("note") or "",
        layout=layout,
    )


def recognise(root: Path) -> str:
    """`msd`, `nnunet` or `brats2020`.

    Raises:
        DataError: none of them.
    """
    description = root / "dataset.json"
    if description.is_file():
        return "nnunet" if "channel_names" in _read(description) else "msd"
    if next(root.glob("*/*_seg.nii*"), None) is not None:
        return "brats2020"
    raise DataError(
        "the layout is not recognised",
        where=root,
        seen="no dataset.json, no */*_seg.nii.gz",
        rule="Medical Segmentation Decathlon, nnU-Net raw, BraTS 2020, or a pattern of your own",
        mend="set download.layout: pattern and download.pattern (see docs/data.md)",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("cannot be read as JSON", where=path, seen=str(error)) from None
    if not isinstance(value, dict):
        raise DataError("must hold a JSON object", where=path, seen=type(value).__name__)
    return value


def _need(description: Mapping[str, Any], key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    value = description.get(key)
    if not isinstance(value, kind) or not value:
        raise DataError(f"'{key}' is missing or has the wrong form", where=path, seen=repr(value)[:100])
    return value


def _msd(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    description = _read(path)
    modality = _need(description, "modality", dict, path)
    cases = []
    for entry in _need(description, "training", list, path):
        if not isinstance(entry, dict) or not {"image", "label"} <= entry.keys():
            raise DataError("each entry of 'training' names image and label", where=path, seen=repr(entry)[:100])
        image, label = (str(entry[k]).removeprefix("./") for k in ("image", "label"))
        cases.append((_stem(image), [_inside(image, path)], _inside(label, path)))
    return {
        "name": description.get("name"),
        "channels": {str(name): _modality(str(name)) for _, name in sorted(modality.items(), key=lambda i: int(i[0]))},
        "labels": _labels(_need(description, "labels", dict, path), path),
        "cases": cases,
        "licence": description.get("licence") or description.get("license"),
        "reference": description.get("reference"),
        "note": description.get("note"),
    }


def _nnunet(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    description = _read(path)
    names = _need(description, "channel_names", dict, path)
    ending = str(description.get("file_ending", ".nii.gz"))
    if ending not in _SUFFIXES:
        raise DataError(
            "only NIfTI files can be read", where=path, seen=f"file_ending {ending}", rule=", ".join(_SUFFIXES)
        )
    channels = [str(name) for _, name in sorted(names.items(), key=lambda i: int(i[0]))]
    first = f"_0000{ending}"
    ids = sorted(p.name.removesuffix(first) for p in (root / "imagesTr").glob(f"*{first}") if p.name[0] != ".")
    return {
        "name": description.get("name") or re.sub(r"^Dataset\d+_", "", root.name),
        "channels": {name: _modality(name) for name in channels},
        "labels": _labels(_need(description, "labels", dict, path), path),
        "cases": [
            (name, [f"imagesTr/{name}_{k:04d}{ending}" for k in range(len(channels))], f"labelsTr/{name}{ending}")
            for name in ids
        ],
        "licence": description.get("licence") or description.get("license"),
        "reference": description.get("reference"),
        "note": description.get("note"),
    }


def _brats2020(root: Path) -> dict[str, Any]:
    cases = []
    for seg in sorted(root.glob("*/*_seg.nii*")):
        suffix = ".nii.gz" if seg.name.endswith(".gz") else ".nii"
        name = seg.name.removesuffix(f"_seg{suffix}")
        folder = seg.parent.name
        cases.append((name, [f"{folder}/{name}_{c}{suffix}" for c in _BRATS_CHANNELS], f"{folder}/{seg.name}"))
    return {
        "name": "BraTS2020",
        "channels": dict.fromkeys(_BRATS_CHANNELS, "MRI"),
        "labels": dict(_BRATS_LABELS),
        "cases": cases,
        "licence": "BraTS 2020 data usage agreement (registration)",
        "reference": "Menze et al. 2015; Bakas et al. 2017, 2018",
    }


def _pattern(root: Path, pattern: PatternConfig) -> dict[str, Any]:
    """Cases are what `{case}` of the label pattern matches; the images are looked for with that id filled in."""
    before, after = pattern.label.split("{case}", 1)
    matcher = re.compile(_as_regex(before) + r"(?P<case>[^/]+)" + _as_regex(after.replace("{case}", "\0")) + r"\Z")
    cases, problems = [], []
    for label in sorted(root.glob(pattern.label.replace("{case}", "*"))):
        relative = label.relative_to(root).as_posix()
        match = matcher.match(relative)
        if match is None or label.name.startswith("._"):
            continue
        case = match["case"]
        images = []
        for image in pattern.images:
            wanted = image.replace("{case}", case)
            hits = [p for p in sorted(root.glob(wanted)) if not p.name.startswith("._")]
            if len(hits) != 1:
                problems.append(f"case {case}: {len(hits)} files match {wanted}")
            else:
                images.append(hits[0].relative_to(root).as_posix())
        cases.append((case, images, relative))
    if problems:
        raise DataError(
            "the image patterns do not name one file each",
            where=root,
            seen="; ".join(problems[:10]),
            mend="correct download.pattern.images",
        )
    if not cases:
        raise DataError(
            "no file matches the label pattern", where=root, seen=pattern.label, mend="correct download.pattern"
        )
    return {"channels": dict(pattern.channels), "labels": dict(pattern.labels), "cases": cases}


def _as_regex(glob: str) -> str:
    return re.escape(glob).replace(r"\*", "[^/]*").replace(r"\?", "[^/]").replace(re.escape("\0"), "(?P=case)")


def _labels(labels: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Name to value, from either {"0": "background"} or {"background": 0}."""
    found: dict[str, int] = {}
    for key, value in labels.items():
        if isinstance(value, list):
            raise DataError(
                "region-based labels are not supported", where=path, seen=f"{key}: {value}", mend="name single labels"
            )
        name, number = (value, key) if isinstance(value, str) and not str(value).isdigit() else (key, value)
        try:
            found[str(name)] = int(number)
        except (TypeError, ValueError):
            raise DataError("'labels' must pair names and whole numbers", where=path, seen=f"{key}: {value}") from None
    zero = next((name for name, value in found.items() if value == 0), None)
    if zero is None:
        found = {"background": 0, **found}
    elif zero != "background":
        found["background"] = found.pop(zero)
    found.pop("ignore", None)
    if len(set(found.values())) != len(found) or len(found) < 2 or not all(0 <= v <= 255 for v in found.values()):
        raise DataError(
            "'labels' are impossible", where=path, seen=found, rule="distinct values 0 to 255, one besides background"
        )
    return found


def _modality(name: str) -> Modality:
    lowered = name.lower()
    if re.search(r"\bct\b|^ct", lowered):
        return "CT"
    if re.search(r"pet", lowered):
        return "PET"
    if re.search(r"ultrasound|\bus\b", lowered):
        return "US"
    if re.search(r"mr|t1|t2|flair|adc|dwi", lowered):
        return "MRI"
    return "other"


def _inside(name: str, path: Path) -> str:
    if name.startswith("/") or ".." in Path(name).parts:
        raise DataError("names a file outside the data set", where=path, seen=name)
    return name


def _stem(name: str) -> str:
    base = name.rsplit("/", 1)[-1]
    return next((base.removesuffix(s) for s in _SUFFIXES if base.endswith(s)), base)


def _patient(case: str, pattern: str | None) -> str:
    if pattern is None:
        return case
    match = re.search(pattern, case)
    if match is None or match[1] is None:
        raise DataError(
            "the patient cannot be told from a case id",
            where="download.patient_pattern",
            seen=case,
            rule=pattern,
            mend="correct the pattern; cases of one patient must stay together in every split",
        )
    return match[1]


def needed_files(index: DatasetIndex) -> Sequence[str]:
    """All files the index names."""
    return sorted({path for case in index.cases for path in (*case.images, case.label)})
