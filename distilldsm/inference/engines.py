"""Engines: a network as a function from (1, C, D, H, W) float32 to logits (1, K, D, H, W) float32."""

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
from distilldsm.inference.depth_stream import DepthStream, NotStreamableError, Shape, StreamGraph, stream_graph

if TYPE_CHECKING:
    from distilldsm.models.base import SegmentationNetwork

Float32 = npt.NDArray[np.float32]
Precision = Literal["f32", "auto"]


@cache
def openvino_core() -> Any:
    """The process's one `openvino.Core`.

    OpenVINO's CPU plugin gives its thread another stack for signals. Of two plugins in one thread, the one that goes
    first unmaps what the other will put back, and the next signal (a child that ends, Ctrl-C) kills the process. So
    there is one, and it stays. Seen with OpenVINO 2026.4.
    """
    import openvino

    return openvino.Core()


FIXED_FROM_VOXELS = 500_000


class NetworkFacts(Protocol):
    """What prediction must know of a network besides its weights: a network, its description or an engine says it."""

    @property
    def stride(self) -> tuple[int, int, int]:
        """What D, H and W must be multiples of."""

    @property
    def depth_halo(self) -> int | None:
        """How many slices beyond a slice its logits depend on; None: the whole depth."""


class Stream(Protocol):
    """A network that takes a volume in chunks: see `depth_stream.DepthStream`."""

    def __call__(self, chunk: Float32, first: int, depth: int) -> Float32: ...


class Engine(ABC):
    """What every runtime offers, and what it knows of its network."""

    kind = "openvino"
    """Which figures of memory.py hold for it."""

    def __init__(self, network: NetworkFacts) -> None:
        self.stride = network.stride
        self.depth_halo = network.depth_halo

    @abstractmethod
    def __call__(self, image: Float32) -> Float32:
        """Logits for one volume whose sizes suit the network's stride."""

    def release(self) -> None:  # noqa: B027 - most engines hold nothing
        """Give back the memory it runs in, where it holds any; the next call takes it again."""

    def open_stream(self, shape: Shape) -> Stream | None:
        """A stream for one volume in chunks of `shape`, logits `depth_halo` slices late; None: there is none."""
        return None

    def stream_bytes(self, shape: Shape) -> int | None:
        """Features that such a stream keeps from chunk to chunk, in float32; None: there is none."""
        return None


class TorchEngine(Engine):
    """Runs the network itself, on the CPU or a GPU."""

    kind = "torch"

    def __init__(self, network: SegmentationNetwork, *, device: str = "cpu", bf16: bool = False) -> None:
        super().__init__(network)
        self.network = network.to(device).eval()
        self.device = device
        self.bf16 = bf16

    def __call__(self, image: Float32) -> Float32:
        import torch

        with torch.inference_mode(), torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(torch.from_numpy(np.ascontiguousarray(image)).to(self.device))
            return logits.float().cpu().numpy()

    def open_stream(self, shape: Shape) -> Stream | None:
        """The networks of `UNet2D` with depth shifts can."""
        from distilldsm.inference.torch_stream import TorchStream
        from distilldsm.models.unet2d import UNet2D

        if type(self.network) is not UNet2D or not self.depth_halo:
            return None
        return TorchStream(self.network, device=self.device, bf16=self.bf16)

    def stream_bytes(self, shape: Shape) -> int | None:
        """Counted on the smallest slice that the stride allows: what is kept grows with the area."""
        from distilldsm.inference.torch_stream import TorchStream

        height, width = self.stride[1:]
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

    def _load(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise unloadable("ONNX Runtime", self.path, error) from None

    def release(self) -> None:
        """Drop the session: its arena keeps the memory of the largest image so far."""
        self.session = None

    def __call__(self, image: Float32) -> Float32:
        if self.session is None:
            self.session = self._load()
        name = self.session.get_inputs()[0].name
        return self.session.run(None, {name: np.ascontiguousarray(image, dtype=np.float32)})[0]


class OpenVINOEngine(Engine):
    """Runs OpenVINO IR (or ONNX) on the CPU.

    precision: `f32` computes in float32 (what parity is measured with); `auto` lets OpenVINO choose, bf16 on CPUs that
    have it: faster, and a few voxels may differ.
    fixed_size: compile for the size of an image from FIXED_FROM_VOXELS on, again when it changes. The logits are the
    same, the memory is about half: only with known sizes can buffers be shared between layers. Smaller images would
    take longer to compile for than to run.
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
        except Exception as error:
            raise self._unloadable(error) from None
        self._free_shape = self._model.input(0).partial_shape
        if not fixed_size:
            self._compile_for(None)

    def _unloadable(self, error: Exception) -> DataError:
        return unloadable("OpenVINO", self.path, error)

    def _compile_for(self, shape: tuple[int, ...] | None) -> None:
        """Compile for images of one shape, or of any (None)."""
        # The old one goes first: both at once would be the peak of the memory.
        self.release()
        try:
            self._model.reshape(self._free_shape if shape is None else list(shape))
            self._compiled = self._core.compile_model(self._model, "CPU", self._properties)
        except Exception as error:
            raise self._unloadable(error) from None
        self._shape = shape

    def release(self) -> None:
        """Drop the compiled network, with the buffers between its layers."""
        self._compiled = self._stream = None

    def _graph(self, shape: Shape) -> StreamGraph | None:
        """The network for chunks of `shape`; None where it cannot be streamed, or lags otherwise than described."""
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
                # The network for any size holds no buffers yet, or small ones; that for a large size goes.
                self._stream = None
                if self.fixed_size:
                    self._compiled = None
                self._stream = shape, self._compiled_stream(graph)
            assert self.depth_halo is not None
            # Each its own, with its own features: one volume never sees another's, nor one that was broken off.
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
        # A compiled network computes one image at a time; a server may ask for several.
        with self._lock:
            shape = image.shape if self.fixed_size and math.prod(image.shape[2:]) >= FIXED_FROM_VOXELS else None
            if self._compiled is None or shape != self._shape:
                self._compile_for(shape)
            # Results are copied: OpenVINO's own buffers are overwritten by the next call.
            image = np.ascontiguousarray(image, dtype=np.float32)
            result = self._compiled([image], share_inputs=False, share_outputs=True)
            return np.array(result[0], dtype=np.float32)


def unloadable(runtime: str, path: str | os.PathLike[str], error: Exception) -> DataError:
    """The error where a runtime refuses a model's file."""
    return DataError(
        f"cannot be loaded by {runtime}",
        where=path,
        seen=str(error)[:300],
        rule="the files that the export wrote, all of a model's data inside its directory",
        hint="copy the model directory again, or export the model again",
    )


def _require_ir(path: Path) -> None:
    """Refuse an `.xml` that is none: OpenVINO would hand it to its readers of every other format."""
    with open(path, "rb") as stream:
        begin = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    if path.suffix == ".xml" and not begin.startswith((b"<?xml", b"<net")):
        raise ValueError("its content is no OpenVINO IR")


def _existing(path: str | os.PathLike[str]) -> Path:
    if not Path(path).is_file():
        raise DataError("model file not found", where=path, hint="export the model first (dvc repro export)")
    return Path(path)
