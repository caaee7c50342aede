"""`distilldsm view`: show a scan with its masks as one page for the browser. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distilldsm.core.errors import ConfigError
from distilldsm.core.text import one_line

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from distilldsm.io.inputs import Input

MAX_VOXELS = 16_000_000
"""Largest volume in the page, voxels. Larger ones lose every second voxel of their finest axis, repeatedly."""


DESCRIPTION = "Show a scan and masks on its grid as one page that works offline. Not a medical device."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("image", metavar="IMAGE", help="a NIfTI scan, or the folder of a DICOM series")
    parser.add_argument("masks", metavar="MASK", nargs="*", help="predicted masks (NIfTI); the page offers a choice")
    parser.add_argument("--truth", metavar="MASK", help="the true mask, shown with each of the others")
    parser.add_argument("-o", "--output", metavar="PAGE.html", help="default: a file in a new temporary folder")
    naming = parser.add_mutually_exclusive_group()
    naming.add_argument("--labels", metavar="NAME=VALUE,...", help="names of the masks' values")
    naming.add_argument("--model", metavar="MODEL", help="take the names from an exported model")
    parser.add_argument(
        "--max-voxels",
        metavar="N",
        type=int,
        default=MAX_VOXELS,
        help="leave voxels out of larger volumes (default: %(default)s)",
    )
    parser.add_argument(
        "--max-memory", metavar="GB", type=float, help="refuse scans that need more memory (default: as for predict)"
    )
    parser.add_argument("--no-open", action="store_true", help="only write the page")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UserError: a file is missing or not a 3-D volume, a mask is not on the image's grid, or the page cannot
            be written.
    """
    from distilldsm.core.files import write_text
    from distilldsm.core.machine import budget_bytes
    from distilldsm.io import read_labels
    from distilldsm.io.formats import LABEL_BYTES
    from distilldsm.io.scan import VOXEL_SHARE
    from distilldsm.report.viewer import ViewedCase, packed, viewer_page
    from distilldsm.report.viewer.packing import BYTES_PER_KEPT_VOXEL

    if args.max_voxels < 1:
        raise ConfigError("--max-voxels is too small", seen=args.max_voxels, rule="1 or more")
    paths = [Path(path) for path in (args.image, *args.masks, *([args.truth] if args.truth else []))]
    one = _one_image(paths[0])
    output = _output(args.output, one.name, paths)
    others = len(paths) - 1
    limit = VOXEL_SHARE * budget_bytes(args.max_memory) - BYTES_PER_KEPT_VOXEL * args.max_voxels
    scan = one.read(1, max(limit, 0), bytes_per_voxel=others + LABEL_BYTES * bool(others))
    for remark in (*scan.remarks, *scan.skipped):
        print(one_line(remark), file=sys.stderr)
    channel = scan.channels[0]
    truth = read_labels(Path(args.truth), on=scan).values if args.truth else None
    masks = [read_labels(Path(path), on=scan).values for path in args.masks]
    labels = _labels(args, [*masks, *([] if truth is None else [truth])])

    def small(mask: npt.NDArray[np.uint8]) -> bytes:
        return packed(mask, scan.affine, is_label=True, max_voxels=args.max_voxels)

    image = packed(channel.raw, scan.affine, is_label=False, max_voxels=args.max_voxels, values=channel.values)
    packed_truth = None if truth is None else small(truth)
    cases = [
        ViewedCase(name=name, image=image, truth=packed_truth, prediction=small(mask))
        for name, mask in zip(_names(args.masks), masks, strict=True)
    ] or [ViewedCase(name=one.name, image=image, truth=packed_truth)]
    write_text(output, viewer_page(one.name, cases, labels))
    if channel.raw.size > args.max_voxels:
        sizes = " x ".join(str(n) for n in scan.shape)
        print(f"{sizes} voxels are more than --max-voxels {args.max_voxels}: some are left out", file=sys.stderr)
    print(one_line(output))
    if not args.no_open and _has_display():
        webbrowser.open(output.resolve().as_uri())


def _one_image(path: Path) -> Input:
    from distilldsm.io.inputs import find_inputs

    scans, *_ = find_inputs([path], 1)
    if len(scans) != 1:
        raise ConfigError(
            "holds several scans",
            where=path,
            seen=", ".join(one.name for one in scans[:5]),
            rule="one scan",
            hint="give one of the files, or the folder of one series",
        )
    return scans[0]


def _labels(args: argparse.Namespace, masks: Sequence[npt.NDArray[np.uint8]]) -> Mapping[str, int]:
    """Names of the masks' values: from `--labels`, from the model, or `label N` for each value N."""
    import numpy as np

    if args.model:
        from distilldsm.models.catalogue import model_directory
        from distilldsm.models.package import load_metadata

        return load_metadata(model_directory(args.model)).labels
    if args.labels:
        return _parse(args.labels)
    values = sorted({int(value) for mask in masks for value in np.unique(mask)} - {0})
    return {f"label {value}": value for value in values}


def _parse(text: str) -> dict[str, int]:
    labels: dict[str, int] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if not (name.strip() and value.strip().isdecimal() and int(value) <= 255) or name.strip() in labels:
            raise ConfigError("is not a label", where="--labels", seen=item, rule="NAME=VALUE, values from 0 to 255")
        labels[name.strip()] = int(value)
    if len(set(labels.values())) < len(labels):
        raise ConfigError("gives two names to one value", where="--labels", seen=text)
    return labels


def _names(masks: Sequence[str]) -> list[str]:
    """A different name for each mask: its file name, with the folder if two file names are the same."""
    from distilldsm.io.formats import stem

    names = [stem(Path(mask)) for mask in masks]
    return names if len(set(names)) == len(names) else list(masks)


def _output(page: str | None, name: str, inputs: Sequence[Path]) -> Path:
    from distilldsm.io.inputs import refuse_input

    if page is None:
        # Only its owner can read this folder: the page holds the patient's scan.
        return Path(tempfile.mkdtemp(prefix="distilldsm-view-")) / f"{name}.html"
    path = Path(page)
    if path.suffix != ".html" or path.is_dir():
        raise ConfigError("is not the name of a page", where=path, rule="a file name ending with .html")
    if not path.parent.is_dir():
        raise ConfigError("the directory of the output does not exist", where=path.parent, hint="make it first")
    refuse_input(path, inputs, "is an input")
    return path


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
