"""From a scan to a mask in the scan's own geometry, with any engine. All callers use this path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.core.machine import budget_bytes
from distilldsm.data.geometry import NetworkImage, ScanMask, check_scale
from distilldsm.data.plan import Plan
from distilldsm.data.targets import Targets
from distilldsm.inference.memory import (
    DEFAULT_PIECE_VOXELS,
    MODEL_BYTES,
    StreamCost,
    activation_bytes,
    plan_pieces,
    stream_cost,
)
from distilldsm.inference.postprocess import BYTES_PER_VOXEL, keep_largest
from distilldsm.inference.probabilities import Ensemble
from distilldsm.inference.windows import STREAM_SLICES, Pieces, Slices, padded_size, predict_logits, through_network
from distilldsm.io.scan import Scan
from distilldsm.models.package import ModelMetadata, NetworkInfo


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result for one scan.

    mask: (X, Y, Z) uint8 label values on the scan's grid. volumes_ml: volume of each label and region. pieces, count:
    kind and number of pieces in the network. exact: the labels are the same as for the volume in one piece.
    """

    mask: npt.NDArray[np.uint8]
    volumes_ml: Mapping[str, float]
    pieces: Pieces
    count: int
    exact: bool


class Observer:
    """Follows a prediction. This base class does nothing."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """A context for the phase `preprocess`, `network` or `restore`; each phase is entered many times."""
        return nullcontext()

    def planned(self, pieces: Pieces, count: int) -> None:
        """Is called before the network runs."""

    def follow(self, stream: Iterator[Slices], count: int) -> Iterator[Slices]:
        """Iterates over the pieces, e.g. to show progress."""
        return stream


class Predictor:
    """A trained model or an ensemble that is ready to predict.

    Args:
        network: computes the class probabilities.
        plan: how scans are brought into network space.
        described: the facts about each member's network, for planning memory.
        metadata: the metadata of the exported models, in order.
        keep_largest: labels or regions with their values; masks keep only the largest connected component of each.
        max_voxels: largest piece that the network computes at once, if no memory limit is set.
    """

    def __init__(
        self,
        network: Ensemble,
        plan: Plan,
        *,
        described: Sequence[NetworkInfo] = (),
        metadata: Sequence[ModelMetadata] = (),
        keep_largest: Mapping[str, tuple[int, ...]] | None = None,
        max_voxels: int = DEFAULT_PIECE_VOXELS,
    ) -> None:
        self.network = network
        self.plan = plan
        self.described = tuple(described)
        self.models = tuple(metadata)
        self.keep_largest = dict(keep_largest or {})
        self.max_voxels = max_voxels

    @property
    def metadata(self) -> ModelMetadata | None:
        """The metadata of the exported model; for an ensemble, those of its first model."""
        return self.models[0] if self.models else None

    def predict(
        self,
        scan: Scan,
        *,
        memory: int | None = None,
        held_bytes: int = 0,
        probabilities: npt.NDArray | None = None,
        observer: Observer | None = None,
    ) -> Prediction:
        """Segment a scan; the mask is on the scan's grid.

        Args:
            memory: bytes for the whole process; None: 3 GB, or half of the available memory if that is less.
            held_bytes: bytes that the caller holds in addition to scan and mask.
            probabilities: (X, Y, Z, K) zeros, to be filled: uint8 with round(255 p), or float32.

        Raises:
            DataError: the voxel size is far from the training scans', memory is too small, or the network's outputs
                are not finite.
        """
        observer = observer or Observer()
        check_scale(scan, self.plan)
        with observer.phase("preprocess"):
            image = NetworkImage(scan, self.plan)
        pieces = self._plan_pieces(scan, image, memory, held_bytes)
        count = len(pieces.windows(padded_size(image.shape, self.network.stride)[0], self.network))
        observer.planned(pieces, count)

        restored = ScanMask(image.record, self.plan, probabilities)
        stream = through_network(self.network, image, pieces, observer.phase)
        try:
            for first, planes in observer.follow(stream, count):
                with observer.phase("restore"):
                    restored.add(first, planes)
        except DataError as error:
            raise error.at(scan.path) from None
        with observer.phase("restore"):
            self._postprocess(restored)
        # In bf16 the runtime rounds a network and its stream in a different order.
        rounded = pieces.streamed and self.network.members[0].engine.kind == "openvino-auto"
        voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
        return Prediction(
            mask=restored.mask,
            volumes_ml=volumes_ml(self.plan.targets, restored.counts.tolist(), voxel_ml),
            pieces=pieces,
            count=count,
            exact=pieces.exact and not rounded,
        )

    def logits(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (K, D, H, W) of an image (C, D, H, W) in network space, from the (first) network, not averaged."""
        return predict_logits(self.network.members[0].engine, image, max_voxels=self.max_voxels)

    def _postprocess(self, restored: ScanMask) -> None:
        if self.keep_largest:
            self.network.release()
        for values in self.keep_largest.values():
            for value, removed in keep_largest(restored.mask, values).items():
                restored.counts[self.plan.class_values.index(value)] -= removed
                restored.counts[0] += removed

    def _plan_pieces(self, scan: Scan, image: NetworkImage, memory: int | None, held_bytes: int) -> Pieces:
        network, channels, classes = self.network, len(self.plan.channels), self.plan.targets.channels
        kind = network.members[0].engine.kind
        voxels = int(np.prod(scan.shape, dtype=np.int64))
        plane = image.record.cropped[1] * image.record.cropped[2]
        held = held_bytes + scan.nbytes + voxels + plane * (160 * channels + 40 * classes)
        held += sum(MODEL_BYTES + 4 * one.parameters for one in self.described[1:])
        padded = padded_size(image.shape, network.stride)
        sizes = [(one.name, one.options, kind, one.macs_per_voxel) for one in self.described]

        def stream() -> StreamCost | None:
            kept = network.stream_bytes((1, channels, STREAM_SLICES, *padded[1:]))
            if kept is None:
                return None
            name, options, _, macs = sizes[0] if sizes else ("distill_dsm", {}, kind, 0.0)
            return stream_cost(name, options, kind, kept, macs)

        return plan_pieces(
            padded,
            stride=network.stride,
            depth_halo=network.depth_halo,
            per_voxel=max((activation_bytes(*size) for size in sizes), default=activation_bytes("unet2d", {}, kind)),
            channels=channels,
            classes=classes,
            held_bytes=held,
            budget=budget_bytes(None) if memory is None else memory,
            where=scan.path,
            limit_voxels=self.max_voxels if memory is None else None,
            engine=kind,
            mirrored=network.mirrored,
            averaged=len(network.members) > 1,
            after_bytes=BYTES_PER_VOXEL * voxels if self.keep_largest else 0,
            stream=stream,
        )


def volumes_ml(targets: Targets, counts: Sequence[int], voxel_ml: float) -> dict[str, float]:
    """Volume of each label, ml, then of each region (all its labels in the mask together).

    counts: number of voxels of each class. A region appears as `NAME (region)` if a label has the same name but other
    voxels.
    """
    voxels = dict(zip(targets.class_values, counts, strict=True))
    labels = dict(zip(targets.class_names, targets.class_values, strict=True))
    found = {name: round(voxels[value] * voxel_ml, 4) for name, value in labels.items() if value != 0}
    for region in targets.regions:
        other = region.name in labels and region.values != (labels[region.name],)
        name = f"{region.name} (region)" if other else region.name
        found[name] = round(sum(voxels[value] for value in region.values) * voxel_ml, 4)
    return found
