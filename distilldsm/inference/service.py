"""What the model that is registered in MLflow answers: logits for arrays, masks for files of scans."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm.core.errors import UserError
from distilldsm.inference.predict import Predictor
from distilldsm.io import read_scan, write_mask

ROOT_VARIABLE = "DISTILLDSM_SCANS"
"""Environment variable that names the folder a server may read scans from and write masks to."""


def answer(predictor: Predictor, data: Any, params: Mapping[str, Any] | None = None, *, remote: bool) -> dict[str, Any]:
    """Logits of arrays, or the mask of a scan.

    Args:
        data: an array (N, C, D, H, W) float32 in network space, or an array (C) of paths; either alone or as
            `{"image": array}`. Is not looked at where `params` give paths.
        params: `paths`: NIfTI files of one scan, one per channel in the model's order (or one 4-D file);
            `output`: NIfTI file to write its mask to.
        remote: somebody else asks: files only below the folder that DISTILLDSM_SCANS names.

    Returns:
        `{"logits": (N, K, D, H, W) float32}`; for a scan `{"mask": (X, Y, Z) uint8}`, label values on the scan's own
        grid, or `{"output": path}` where it was written.

    Raises:
        UserError: a scan cannot be read or predicted, or lies where the server may not look.
    """
    params = params or {}
    paths = [str(path) for path in params.get("paths") or ()]
    image = np.asarray(data.get("image") if isinstance(data, Mapping) else data)
    if not paths and image.dtype.kind in "OUS":
        paths = [str(path) for path in image.ravel()]
    if paths:
        return _mask(predictor, paths, str(params.get("output") or ""), remote)
    if image.ndim != 5 or image.size == 0:
        raise UserError(
            "is neither an image nor paths of one",
            where="image",
            seen=f"shape {image.shape}",
            rule="(N, C, D, H, W) float32, or paths in the parameter 'paths'",
        )
    return {"logits": np.stack([predictor.logits(one) for one in image.astype(np.float32, copy=False)])}


def _mask(predictor: Predictor, paths: Sequence[str], output: str, remote: bool) -> dict[str, Any]:
    files = [_allowed(path, remote) for path in paths]
    target = _allowed(output, remote) if output else None
    if target is not None and target in files:
        raise UserError("is an input", where=target, hint="give another output")
    if target is not None and (not target.name.endswith((".nii", ".nii.gz")) or not target.parent.is_dir()):
        raise UserError("cannot be written", where=target, rule=".nii or .nii.gz, in a folder that exists")
    channels = [channel.name for channel in predictor.plan.channels]
    scan = read_scan(files, len(channels), names=channels)
    mask = predictor.predict(scan).mask
    if target is None:
        return {"mask": mask}
    write_mask(target, mask, scan)
    return {"output": str(target)}


def _allowed(path: str, remote: bool) -> Path:
    """The path itself; for a server a resolved one, below its folder.

    Raises:
        UserError: a server has no folder for scans, or the path leads out of it.
    """
    root = os.environ.get(ROOT_VARIABLE, "")
    if not remote and not root:
        return Path(path)
    if not root:
        raise UserError(
            "this server takes no paths", where=path, hint=f"start it with {ROOT_VARIABLE} naming the folder of scans"
        )
    folder = Path(root).resolve()
    resolved = (folder / path).resolve()
    if not resolved.is_relative_to(folder):
        raise UserError("lies outside the folder of scans", where=path, rule=f"below {ROOT_VARIABLE}")
    return resolved
