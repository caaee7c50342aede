"""Engines: a network as a function of an image (1, C, D, H, W) float32 that returns logits (1, K, D, H, W) float32."""

from __future__ import annotations

import math
import os
import threading
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.core.machine import thread_limit
from distilldsm.inference.depth_stream import DepthStream, NotStreamableError, Shape, StreamGraph, stream_graph

if TYPE_CHECKING:
    from distilldsm.models.base import SegmentationNetwork

Float32 = npt.NDArray[np.float32]
Precision = Literal["f32", "auto"]


@cache
def openvino_core() -> Any:
    """The only `openvino.Core` of the process.

    OpenVINO's CPU plugin replaces the signal stack of its thread. With two plugins in one thread, the first to end
    unmaps a stack that the other restores later. The next signal (a child that ends, Ctrl-C) then kills the process.
    So there is only one core, and it is never deleted. Seen with OpenVINO 2026.4.
    """
    import openvino

    core = openvino.Core()
    if limit := thread_limit():
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": limit})
    return core


FIXED_FROM_VOXELS = 500_000


class NetworkFacts(Protocol):
    """What prediction must know about a network besides its weights. A network, its metadata or an engine offers it."""

    @property
    def stride(self) -> tuple[int, int, int]:
        """D, H and W must be multiples of these numbers."""

    @property
    def depth_halo(self) -> int | None:
        """The logits of a slice depend on this many slices on each side; None: on the whole depth."""


class Stream(Protocol):
    """A network that reads a volume in chunks: see `depth_stream.DepthStream`."""

    def __call__(self, chunk: Float32, first: int, depth: int) -> Float32: ...


class Engine(ABC):
    """The interface of every runtime, and the facts about its network."""

    kind = "openvino"
    """The key of this engine's figures in memory.py."""

    def __init__(self, network: NetworkFacts) -> None:
        self.stride = network.stride
        self.depth_halo = network.depth_halo
        self.channels: tuple[Any, Any] = (None, None)
        """Channels of the network's input and output; None or a name: any number."""

    @abstractmethod
    def __call__(self, image: Float32) -> Float32:
        """Logits of one volume; its sizes must be multiples of the network's stride."""

    def release(self) -> None:  # noqa: B027 - most engines hold nothing
        """Free the working memory. The next call allocates it again."""

    def open_stream(self, shape: Shape) -> Stream | None:
        """A stream for one volume in chunks of `shape`, logits `depth_halo` slices late; None: cannot stream."""
        return None

    def stream_bytes(self, shape: Shape) -> int | None:
        """Bytes of float32 features that such a stream stores from chunk to chunk; None: cannot stream."""
        return None


class TorchEngine(Engine):
    """Runs the network itself, on the CPU or a GPU."""

    kind = "torch"

    def __init__(self, network: SegmentationNetwork, *, device: str = "cpu", bf16: bool = False) -> None:
        super().__init__(network)
        self.network = network.to(device).eval()
        self.channels = (network.in_channels, network.out_channels)
        self.device = device
        self.bf16 = bf16

    def __call__(self, image: Float32) -> Float32:
        import torch

        with torch.inference_mode(), torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(torch.from_numpy(np.ascontiguousarray(image)).to(self.device))
            return logits.float().cpu().numpy()

    def open_stream(self, shape: Shape) -> Stream | None:
        """See `Engine.open_stream`. Only `UNet2D` with depth shifts can stream."""
        from distilldsm.inference.torch_stream import TorchStream
        from distilldsm.models.unet2d import UNet2D

        if type(self.network) is not UNet2D or not self.depth_halo:
            return None
        return TorchStream(self.network, device=self.device, bf16=self.bf16)

    def stream_bytes(self, shape: Shape) -> int | None:
        """See `Engine.stream_bytes`. Measured on a small slice, then scaled with the area."""
        from distilldsm.inference.torch_stream import TorchStream

        height, width = 16, 16  # multiples of the pooling, so that the features scale exactly with the area
        stream = self.open_stream(shape)
        if not isinstance(stream, TorchStream):
            return None
        stream(np.zeros((1, shape[1], 1, height, width), dtype=np.float32), 0, 1)
        return 4 * stream.kept_values * (shape[3] * shape[4]) // (height * width)


class OnnxEngine(Engine):
    """Runs model.onnx with ONNX Runtime on the CPU."""

    kind = "onnx"

    def __init__(self, path: str | os.PathLike[str], network: NetworkFacts) -> None:
        super().__init__(network)
        self.path = _existing(path)
        self.session: Any = self._load()
        self.channels = (self.session.get_inputs()[0].shape[1], self.session.get_outputs()[0].shape[1])

    def _load(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_limit() or 0
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise unloadable("ONNX Runtime", self.path, error) from None

    def release(self) -> None:
        """Delete the session, because its arena holds the memory of the largest image so far."""
        self.session = None

    def __call__(self, image: Float32) -> Float32:
        if self.session is None:
            self.session = self._load()
        name = self.session.get_inputs()[0].name
        return self.session.run(None, {name: np.ascontiguousarray(image, dtype=np.float32)})[0]


class OpenVINOEngine(Engine):
    """Runs OpenVINO IR (or ONNX) on the CPU.

    precision: `f32` computes in float32, as in the parity test. `auto` lets OpenVINO choose: bf16 on CPUs that have it,
    which is faster, and a few voxels may differ.
    fixed_size: compile for the exact size of images with at least FIXED_FROM_VOXELS voxels, again for each new size.
    The logits are the same. The memory is about half, because layers can share buffers only if sizes are known. For
    smaller images, compiling would take longer than running.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        network: NetworkFacts,
        *,
        precision: Precision = "f32",
        fixed_size: bool = False,
    ) -> None:
        super().__init__(network)
        self.path = _existing(path)
        self.kind = "openvino" if precision == "f32" else "openvino-auto"
        self.fixed_size = fixed_size
        self._properties = {"INFERENCE_PRECISION_HINT": "f32"} if precision == "f32" else {}
        self._shape: tuple[int, ...] | None = None
        self._compiled: Any = None
        self._stream: tuple[Shape, Any] | None = None
        self._lock = threading.Lock()
        self._core = openvino_core()
        try:
            _require_ir(self.path)
            self._model = self._core.read_model(str(self.path))
            _require_finite_weights(self._model)
        except Exception as error:
            raise self._unloadable(error) from None
        self._free_shape = self._model.input(0).partial_shape
        shapes = (self._free_shape, self._model.output(0).partial_shape)
        self.channels = tuple(shape[1].get_length() if shape[1].is_static else None for shape in shapes)  # type: ignore[assignment]
        if not fixed_size:
            self._compile_for(None)

    def _unloadable(self, error: Exception) -> DataError:
        return unloadable("OpenVINO", self.path, error)

    def _compile_for(self, shape: tuple[int, ...] | None) -> None:
        """Compile for images of one shape, or of any shape (None)."""
        # Delete the old network first. Both together would raise the peak memory.
        self.release()
        try:
            self._model.reshape(self._free_shape if shape is None else list(shape))
            self._compiled = self._core.compile_model(self._model, "CPU", self._properties)
        except Exception as error:
            raise self._unloadable(error) from None
        self._shape = shape

    def release(self) -> None:
        """Delete the compiled network and the buffers between its layers."""
        self._compiled = self._stream = None

    def _graph(self, shape: Shape) -> StreamGraph | None:
        """The network for chunks of `shape`; None if it cannot be streamed, or its lag differs from the metadata."""
        try:
            graph = stream_graph(self._model, shape)
        except NotStreamableError:
            return None
        return graph if graph.lag == self.depth_halo else None

    def stream_bytes(self, shape: Shape) -> int | None:
        """As `Engine.stream_bytes`."""
        graph = self._graph(shape)
        return None if graph is None else graph.state_bytes

    def open_stream(self, shape: Shape) -> Stream | None:
        """As `Engine.open_stream`."""
        with self._lock:
            if self._stream is None or self._stream[0] != shape:
                graph = self._graph(shape)
                if graph is None:
                    return None
                # Only the network for a large size is deleted. That for any size has small buffers at most.
                self._stream = None
                if self.fixed_size:
                    self._compiled = None
                self._stream = shape, self._compiled_stream(graph)
            assert self.depth_halo is not None
            # Each volume gets its own stream. So no features of another or an interrupted volume are used.
            return DepthStream(self._stream[1], self.depth_halo)

    def _compiled_stream(self, graph: StreamGraph) -> Any:
        try:
            return self._core.compile_model(graph.model, "CPU", self._properties)
        except Exception as error:
            raise DataError(
                "cannot be compiled for a stream of slices",
                where=self.path,
                seen=str(error)[:300],
                hint="free memory, or predict with --engine onnx",
            ) from None

    def __call__(self, image: Float32) -> Float32:
        # A compiled network computes one image at a time, but a server may send several at once.
        with self._lock:
            shape = image.shape if self.fixed_size and math.prod(image.shape[2:]) >= FIXED_FROM_VOXELS else None
            if self._compiled is None or shape != self._shape:
                self._compile_for(shape)
            # Copy the results, because the next call overwrites OpenVINO's buffers.
            image = np.ascontiguousarray(image, dtype=np.float32)
            result = self._compiled([image], share_inputs=False, share_outputs=True)
            return np.array(result[0], dtype=np.float32)


def unloadable(runtime: str, path: str | os.PathLike[str], error: Exception) -> DataError:
    """The error for a model's file that a runtime cannot load."""
    return DataError(
        f"cannot be loaded by {runtime}",
        where=path,
        seen=str(error)[:300],
        rule="unchanged files of the export, with all data inside the model's directory",
        hint="copy the model directory again, or export the model again",
    )


def _require_ir(path: Path) -> None:
    """Refuse an `.xml` file without XML. OpenVINO would try its readers for every other format."""
    with open(path, "rb") as stream:
        begin = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    if path.suffix == ".xml" and not begin.startswith((b"<?xml", b"<net")):
        raise ValueError("its content is not OpenVINO IR")


def _require_finite_weights(model: Any) -> None:
    """Refuse an IR with NaN or infinite weights. OpenVINO's ReLU turns NaN into 0, so the logits may not show it."""
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.data.dtype.kind == "f" and not np.isfinite(node.data).all():
            raise ValueError(f"the weights of {node.get_friendly_name()} are not finite")


def _existing(path: str | os.PathLike[str]) -> Path:
    if not Path(path).is_file():
        raise DataError("model file not found", where=path, hint="export the model first (dvc repro export)")
    return Path(path)
