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
"""Environment variable: a server may read scans only in this folder."""
OUTPUT_VARIABLE = "DISTILLDSM_MASKS"
"""Environment variable: a server may write masks only in this folder; by default, in that of the scans."""


def answer(predictor: Predictor, data: Any, params: Mapping[str, Any] | None = None, *, remote: bool) -> dict[str, Any]:
    """Compute the logits of arrays, or the mask of a scan.

    Args:
        data: an array (N, C, D, H, W) float32 in network space, or an array (C) of paths; either alone or as
            `{"image": array}`. It is ignored if `params` has `paths`.
        params: `paths`: NIfTI files of one scan, one per channel in the model's order (or one 4-D file);
            `output`: NIfTI file for the mask.
        remote: the request comes from a client of a server. Then it reads only below the folder DISTILLDSM_SCANS, and
            writes only below DISTILLDSM_MASKS.

    Returns:
        `{"logits": (N, K, D, H, W) float32}`; for a scan `{"mask": (X, Y, Z) uint8}` with label values on the scan's
        own grid, or `{"output": path}` if the mask was written to a file.

    Raises:
        UserError: the arrays are unfit, the scan cannot be read or predicted or lies outside the server's folder, or
            the output exists.
    """
    params = params or {}
    paths = [str(path) for path in params.get("paths") or ()]
    image = np.asarray(data.get("image") if isinstance(data, Mapping) else data)
    if not paths and image.dtype.kind in "OUS":
        paths = [str(path) for path in image.ravel()]
    if paths:
        return _mask(predictor, paths, str(params.get("output") or ""), remote)
    channels = len(predictor.plan.channels)
    if image.ndim != 5 or image.size == 0 or image.shape[1] != channels or image.dtype.kind not in "biuf":
        raise UserError(
            "is neither an image nor paths of one",
            where="image",
            seen=f"shape {image.shape}, {image.dtype}",
            rule=f"(N, {channels}, D, H, W) float32, or paths in the parameter 'paths'",
        )
    if not np.isfinite(image).all():
        raise UserError("holds NaN or infinite values", where="image", hint="replace them, e.g. by the background")
    return {"logits": np.stack([predictor.logits(one) for one in image.astype(np.float32, copy=False)])}


def _mask(predictor: Predictor, paths: Sequence[str], output: str, remote: bool) -> dict[str, Any]:
    files = [_allowed(path, ROOT_VARIABLE, remote) for path in paths]
    variable = OUTPUT_VARIABLE if os.environ.get(OUTPUT_VARIABLE) else ROOT_VARIABLE
    target = _allowed(output, variable, remote) if output else None
    if target is not None and (not target.name.endswith((".nii", ".nii.gz")) or not target.parent.is_dir()):
        raise UserError("cannot be written", where=target, rule=".nii or .nii.gz, in a folder that exists")
    channels = [channel.name for channel in predictor.plan.channels]
    scan = read_scan(files, len(channels), names=channels)
    if target is None:
        return {"mask": predictor.predict(scan).mask}
    try:
        target.open("xb").close()  # now, so that no request overwrites another's mask
    except FileExistsError:
        raise UserError("exists", where=target, rule="nothing is overwritten", hint="give another output") from None
    try:
        write_mask(target, predictor.predict(scan).mask, scan)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return {"output": str(target)}


def _allowed(path: str, variable: str, remote: bool) -> Path:
    """Return the path; for a server, resolve it below the folder that the variable names.

    Raises:
        UserError: the server has no such folder, or the path lies outside it.
    """
    if "\0" in path:
        raise UserError("is not a path", where=path)
    root = os.environ.get(variable, "")
    if not remote and not root:
        return Path(path)
    if not root:
        raise UserError("this server does not accept paths", where=path, hint=f"start it with {variable}=FOLDER")
    folder = Path(root).resolve()
    resolved = (folder / path).resolve()
    if not resolved.is_relative_to(folder):
        kind = "scans" if variable == ROOT_VARIABLE else "masks"
        raise UserError(f"lies outside the folder of {kind}", where=path, rule=f"below {variable}")
    return resolved
