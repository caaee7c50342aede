"""The public Python interface. The package `distilldsm` exports these names."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm import io
from distilldsm.core.errors import DataError, UserError
from distilldsm.core.machine import budget_bytes
from distilldsm.inference.loading import Precision, Runtime, load_exported
from distilldsm.inference.predict import Predictor
from distilldsm.inference.probabilities import Mirror
from distilldsm.io import Scan

PathLike = str | os.PathLike[str]
REGISTERED = "models:/"


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """The result for one scan, on the scan's own grid."""

    mask: npt.NDArray[np.uint8]
    """(X, Y, Z) label values."""
    volumes_ml: Mapping[str, float]
    """Volume of each label and region, ml."""
    probabilities: npt.NDArray[np.float32] | None
    """(X, Y, Z, K), one per class or region; None if not requested."""
    scan: Scan
    """The segmented scan: affine, voxel size, and the header that `write_mask` needs."""


class Model:
    """An exported model; create it with `load_model`.

    Attributes:
        labels: name to value in the masks.
        channels: names of the images of a scan, in order.
    """

    def __init__(self, predictor: Predictor, folder: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self._predictor = predictor
        self._folder = folder  # keeps a temporary download until the model is deleted
        self.labels = dict(zip(predictor.plan.class_names, predictor.plan.class_values, strict=True))
        self.channels = tuple(channel.name for channel in predictor.plan.channels)

    def predict(
        self,
        source: PathLike | Sequence[PathLike] | nib.Nifti1Image | npt.NDArray | Scan,
        *,
        affine: npt.ArrayLike | None = None,
        probabilities: bool = False,
        max_memory_gb: float | None = None,
    ) -> Segmentation:
        """Segment one scan, as `distilldsm predict` does.

        Args:
            source: a file or the folder of a DICOM series; a list with one of these per channel; a nibabel image; an
                array (X, Y, Z), or (C, X, Y, Z) for several channels, with its `affine`; or a `Scan` of `read_scan`.
            affine: (4, 4), voxel to scanner mm (RAS+); for an array only.
            probabilities: also return the probabilities.
            max_memory_gb: limit for the whole process; default: 3, or half of the available memory if that is less.

        Raises:
            UserError: the scan cannot be read, or its voxel size is far from the training scans'.
        """
        scan = self._scan(source, affine)
        maps = None
        if probabilities:
            maps = np.zeros((*scan.shape, self._predictor.plan.targets.channels), dtype=np.float32)
        memory = None if max_memory_gb is None else budget_bytes(max_memory_gb)
        prediction = self._predictor.predict(scan, memory=memory, probabilities=maps)
        return Segmentation(mask=prediction.mask, volumes_ml=prediction.volumes_ml, probabilities=maps, scan=scan)

    def _scan(self, source: Any, affine: npt.ArrayLike | None) -> Scan:
        if isinstance(source, Scan):
            return source
        if isinstance(source, np.ndarray):
            if affine is None:
                raise DataError(
                    "an array needs its affine", hint="predict(array, affine=...), voxel to scanner mm (RAS+)"
                )
            voxels = np.asarray(np.moveaxis(source, 0, -1) if source.ndim == 4 else source, dtype=np.float32)
            source = nib.Nifti1Image(voxels, np.asarray(affine, dtype=np.float64))
        if not isinstance(source, nib.Nifti1Image):
            return read_scan(source, self.channels)
        # Use the reader of files, so that the same rules for headers apply.
        with tempfile.TemporaryDirectory(prefix="distilldsm-") as folder:
            path = Path(folder) / "image.nii"
            nib.save(source, path)
            return read_scan(path, self.channels).load()


def load_model(
    model: PathLike,
    *,
    engine: Runtime = "openvino",
    precision: Precision = "f32",
    ensemble: Sequence[PathLike] = (),
    mirror: Mirror = (),
    postprocess: bool = False,
) -> Model:
    """Load a model that the export stage wrote, and check its files against their hashes.

    Args:
        model: a directory, e.g. `export/fold0`; a name of `distilldsm models`; or a model of MLflow's registry, e.g.
            `models:/NAME@champion` (needs mlflow and its tracking URI).
        engine, precision, ensemble, mirror, postprocess: as for `distilldsm predict`.

    Raises:
        UserError: the model does not exist or is damaged, or the models of an ensemble do not fit together.
    """
    folder = None
    if str(model).startswith(REGISTERED):
        folder = tempfile.TemporaryDirectory(prefix="distilldsm-")
        model = _downloaded(str(model), folder.name)
    predictor = load_exported(
        Path(model),
        runtime=engine,
        precision=precision,
        fixed_size=True,
        ensemble=[Path(other) for other in ensemble],
        mirror=mirror,
        postprocess=postprocess,
    )
    return Model(predictor, folder)


def _downloaded(uri: str, folder: str) -> str:
    try:
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise UserError("needs mlflow", where=uri, hint="pip install mlflow") from None
    try:
        return str(download_artifacts(artifact_uri=uri, dst_path=folder))
    except (MlflowException, OSError) as error:
        raise UserError(
            "cannot be loaded from MLflow",
            where=uri,
            seen=str(error)[:300],
            hint="check MLFLOW_TRACKING_URI and the name",
        ) from None


def read_scan(paths: PathLike | Sequence[PathLike], channels: Sequence[str] = ("image",)) -> Scan:
    """Read one scan: a file or series for each channel, or one file with all channels.

    Args:
        channels: names of the channels, in the model's order.

    Raises:
        DataError: see `io.read_scan`. Voxels are read when they are first needed.
    """
    files = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    names = list(channels)
    return io.read_scan([Path(file) for file in files], len(names), names=names if len(names) > 1 else ())


def write_mask(
    path: PathLike, mask: npt.NDArray[np.uint8], scan: Scan, *, labels: Mapping[str, int] | None = None
) -> None:
    """Write a mask (X, Y, Z) on the scan's grid: NIfTI, or DICOM SEG (`.dcm`; only for a DICOM scan, needs `labels`).

    Raises:
        UserError: see `io.write_mask`.
    """
    io.write_mask(Path(path), mask, scan, labels=labels)
