"""The answers of the model in MLflow's registry: logits for arrays, masks for scan files."""

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
"""Environment variable: a server may read scans and write masks only in this folder."""


def answer(predictor: Predictor, data: Any, params: Mapping[str, Any] | None = None, *, remote: bool) -> dict[str, Any]:
    """Compute the logits of arrays, or the mask of a scan.

    Args:
        data: an array (N, C, D, H, W) float32 in network space, or an array (C) of paths; either alone or as
            `{"image": array}`. It is ignored if `params` has `paths`.
        params: `paths`: NIfTI files of one scan, one per channel in the model's order (or one 4-D file);
            `output`: NIfTI file for the mask.
        remote: the request comes from a client of a server. Then only files below the folder DISTILLDSM_SCANS are used.

    Returns:
        `{"logits": (N, K, D, H, W) float32}`; for a scan `{"mask": (X, Y, Z) uint8}` with label values on the scan's
        own grid, or `{"output": path}` if the mask was written to a file.

    Raises:
        UserError: the scan cannot be read or predicted, or lies outside the server's folder.
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
        raise UserError("is an input file", where=target, hint="give another output")
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
    """Return the path; for a server, resolve it below the server's folder.

    Raises:
        UserError: the server has no folder for scans, or the path lies outside it.
    """
    root = os.environ.get(ROOT_VARIABLE, "")
    if not remote and not root:
        return Path(path)
    if not root:
        raise UserError(
            "this server does not accept paths", where=path, hint=f"start it with {ROOT_VARIABLE}=FOLDER_OF_SCANS"
        )
    folder = Path(root).resolve()
    resolved = (folder / path).resolve()
    if not resolved.is_relative_to(folder):
        raise UserError("lies outside the folder of scans", where=path, rule=f"below {ROOT_VARIABLE}")
    return resolved
