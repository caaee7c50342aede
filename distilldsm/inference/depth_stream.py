"""An OpenVINO network that reads a volume a few slices at a time and stores what its depth shifts need later.

With windows, the slices near both ends are computed only for their neighbours: a window of 26 slices with a halo of 8
yields ten slices. Here every slice is computed once. A depth shift needs the next slice, so its output lags one slice
behind its input. The logits lag behind the image by the number of shifts in a row. Where branches with different lags
meet (skip connections), the earlier branch waits. Waiting tensors are stored in variables of the compiled network.

The graph is derived from any exported graph. A shift is a padding by one slice at one end and by minus one at the other
(`masked_depth_shift`). Every other operation must be known to keep slices apart; otherwise the network is refused. The
depth axis is found by comparing the graph for two very different numbers of slices: it is the only axis that differs.
This also shows that no value depends on the number of slices. Slices outside the volume are zero at the input of a
shift, as in the padding that it replaces. INT8 is refused: OpenVINO rounds its layers differently in the new graph, and
one in a hundred labels of a random network changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Shape = tuple[int, int, int, int, int]
"""(1, C, n, H, W); n is the number of slices at a time."""

# fmt: off
ELEMENTWISE = frozenset((
    "Abs", "Add", "Clamp", "Concat", "Convert", "Divide", "Elu", "Exp", "Gelu", "HSigmoid", "HSwish", "Maximum",
    "Minimum", "Mish", "Multiply", "Negative", "PRelu", "Power", "Relu", "Select", "Selu", "Sigmoid", "SoftPlus",
    "Sqrt", "Subtract", "Swish", "Tanh",
))
IN_PLANE = frozenset((
    "AvgPool", "BatchNormInference", "Convolution", "ConvolutionBackpropData", "GroupConvolution", "Interpolate",
    "MaxPool",
))
# fmt: on
ALONG_AXES = {"MVN": 1, "ReduceMean": 1, "Slice": 4, "Split": 1, "VariadicSplit": 1}
"""Operations along some axes, and the index of the input that names these axes."""
MANY = 1009
"""The second copy of the graph has this many more slices."""


class NotStreamableError(ValueError):
    """The network cannot be streamed: it has no depth shift, or an operation that may mix slices in another way."""


@dataclass(frozen=True)
class StreamGraph:
    """model: an `openvino.Model` from (image (1, C, n, H, W), valid (n + lag,)) to logits (1, K, n, H, W).

    lag: the logits are this many slices late; state_bytes: size of the float32 features stored from call to call.
    """

    model: Any
    lag: int
    state_bytes: int


@dataclass
class _Tensor:
    """A tensor of the graph: its slice t is slice t - wait of `source`, and arrives `lag` slices late."""

    source: Any
    axis: int
    """The depth axis."""
    wait: int = 0
    lag: int = 0
    zero_outside: bool = False


@dataclass
class _Line:
    """A tensor that some readers need later than it is computed. `readers`: slices to wait, to the readers."""

    source: Any
    axis: int
    readers: dict[int, list[Any]] = field(default_factory=dict)


def stream_graph(network: Any, shape: Shape) -> StreamGraph:
    """Rewrite a copy of an exported network (`openvino.Model`) for chunks of a volume.

    Args:
        shape: the shape of one chunk.

    Raises:
        NotStreamableError: the network has no depth shift, or an operation that may mix slices in another way.
    """
    try:
        return _Rewriting(network, shape).result()
    except RuntimeError as error:  # from OpenVINO: wrong shapes or types
        raise NotStreamableError(str(error)) from None


class _Rewriting:
    """Walk through a graph from the image to the logits, note which tensors must wait, then insert the delays."""

    def __init__(self, network: Any, shape: Shape) -> None:
        import openvino.opset13 as ops

        self.ops = ops
        self.count = shape[2]
        named = network.clone()
        # Operations are identified by name, and names in a file may not be unique.
        for k, node in enumerate(named.get_ordered_ops()):
            node.set_friendly_name(f"{node.get_type_name()}_{k}")
        self.graph = _folded(named, shape)
        longer = _folded(named, (*shape[:2], shape[2] + MANY, *shape[3:]))
        self.longer = {node.get_friendly_name(): node for node in longer.get_ordered_ops()}
        self.known: dict[tuple[str, int], _Tensor] = {}
        self.lines: dict[tuple[str, int], _Line] = {}
        self.chosen: dict[tuple[int, int, int], list[Any]] = {}
        """Selections that set slices outside the volume to zero, by lag, axis and rank. Their masks are made last."""

    def result(self) -> StreamGraph:
        import openvino

        if len(self.graph.get_results()) != 1:
            raise NotStreamableError("the network must have exactly one output")
        for node in self.graph.get_ordered_ops():
            if node.get_type_name() == "Parameter":
                self.known[_key(node.output(0))] = _Tensor(node.output(0), axis=2)
            elif any(_key(source) in self.known for source in node.input_values()):
                self._follow(node)
        if not self.chosen:
            raise NotStreamableError("the network has no depth shift")
        lag = self.known[_key(self.graph.get_results()[0].output(0))].lag

        valid = self.ops.parameter([self.count + lag], bool, name="valid")
        for (behind, axis, rank), selections in self.chosen.items():
            form = np.array([self.count if k == axis else 1 for k in range(rank)])
            mask = self.ops.reshape(self._slices(valid, 0, lag - behind, self.count), form, special_zero=False)
            for selection in selections:
                selection.input(0).replace_source_output(mask.output(0))
        sinks: list[Any] = []
        state = sum(self._delay(line, f"waiting{k}", sinks) for k, line in enumerate(self.lines.values()))
        parameters = [*self.graph.get_parameters(), valid]
        model = openvino.Model(self.graph.get_results(), sinks, parameters, "depth_stream")
        return StreamGraph(model=model, lag=lag, state_bytes=state)

    def _follow(self, node: Any) -> None:
        """Note axis and lag of a node's outputs, and how long its inputs must wait."""
        readers = [entry for entry in node.inputs() if _key(entry.get_source_output()) in self.known]
        tensors = [self.known[_key(entry.get_source_output())] for entry in readers]
        axes = [self._depth_axis(node, output) for output in node.outputs()]
        step = _depth_step(node, tensors[0].axis)
        if step:
            self.known[_key(node.output(0))] = self._shifted(readers[0], step)
            return
        self._require_slicewise(node, [tensor.axis for tensor in tensors], axes[0])
        late = max(tensor.lag for tensor in tensors)
        for entry, tensor in zip(readers, tensors, strict=True):
            line = self.lines.setdefault(_key(tensor.source), _Line(tensor.source, tensor.axis))
            line.readers.setdefault(tensor.wait + late - tensor.lag, []).append(entry)
        for output, axis in zip(node.outputs(), axes, strict=True):
            self.known[_key(output)] = _Tensor(output, axis, lag=late)

    def _depth_axis(self, node: Any, output: Any) -> int:
        """The depth axis: the only axis that is longer in the graph of the longer volume."""
        other = self.longer.get(node.get_friendly_name())
        shape = list(output.get_shape())
        longer = list(other.output(output.get_index()).get_shape()) if other is not None else []
        differ = [k for k, (a, b) in enumerate(zip(shape, longer, strict=False)) if a != b]
        if len(shape) != len(longer) or len(differ) != 1 or shape[differ[0]] != self.count:
            raise NotStreamableError(f"{node.get_type_name()} may mix slices")
        return differ[0]

    def _require_slicewise(self, node: Any, axes: list[int], axis: int) -> None:
        """Raise NotStreamableError unless slice t of the output depends only on slice t of the inputs.

        axes: the depth axis of each input that has one; axis: the depth axis of the output.
        """
        kind, shape, out = node.get_type_name(), list(node.get_input_shape(0)), list(node.get_output_shape(0))
        rules: Mapping[str, Callable[[], bool]] = {
            "MatMul": lambda: len(axes) == 1 and axis == axes[0] < len(shape) - 1 and len(out) == len(shape),
            "Pad": lambda: axis == axes[0] and not _vector(node, 1)[axis] and not _vector(node, 2)[axis],
            "Transpose": lambda: _vector(node, 1)[axis] == axes[0],
            # The same number of values must lie before the depth axis in memory.
            "Reshape": lambda: math.prod(shape[: axes[0]]) == math.prod(out[:axis]),
            "Result": lambda: True,
        }
        if kind in ELEMENTWISE:
            ranks = {len(node.get_input_shape(k)) for k in range(node.get_input_size()) if self._is_known(node, k)}
            fits = ranks == {len(out)} and set(axes) == {axis}
            fits = fits and (kind != "Concat" or node.get_attributes()["axis"] % len(out) != axis)
        elif kind in IN_PLANE:
            fits = axis == axes[0] == 0 and len(shape) == len(out) == 4
        elif kind in ALONG_AXES:
            along = [k % len(shape) for k in _vector(node, ALONG_AXES[kind])]
            fits = axis == axes[0] and len(out) == len(shape) and axis not in along
        else:
            fits = kind in rules and rules[kind]()
        # A constant that depends on the number of slices has another value in a chunk. Shapes are checked above.
        if not fits or not (kind in ("Reshape", "Interpolate") or self._same_constants(node)):
            raise NotStreamableError(f"{kind} may mix slices")

    def _is_known(self, node: Any, index: int) -> bool:
        return _key(node.input_value(index)) in self.known

    def _same_constants(self, node: Any) -> bool:
        other = self.longer[node.get_friendly_name()]
        for k in range(node.get_input_size()):
            if not self._is_known(node, k):
                short, long = (n.input_value(k).get_node() for n in (node, other))
                if not short.get_type_name() == long.get_type_name() == "Constant":
                    return False
                if not np.array_equal(short.data, long.data):
                    return False
        return True

    def _shifted(self, reader: Any, step: int) -> _Tensor:
        """The output of a shift. Its source is set to zero outside the volume."""
        key = _key(reader.get_source_output())
        tensor = self.known[key]
        if not tensor.zero_outside:
            if key != _key(tensor.source):
                raise NotStreamableError("two shifts follow each other without an operation between them")
            _require_float32(tensor.source)
            rank = len(tensor.source.get_shape())
            selection = self.ops.select(np.ones((1,) * rank, dtype=bool), tensor.source, np.float32(0))
            selection.set_friendly_name(f"inside_{key[0]}_{key[1]}")
            self.chosen.setdefault((tensor.lag, tensor.axis, rank), []).append(selection)
            # Later readers use the selection, too. They need the same slices, so one delay line is enough.
            tensor.source, tensor.zero_outside = selection.output(0), True
        return _Tensor(tensor.source, tensor.axis, tensor.wait + (step == 1), tensor.lag + (step == -1))

    def _delay(self, line: _Line, name: str, sinks: list[Any]) -> int:
        """Insert the delays of a tensor's readers; return the number of stored bytes."""
        import openvino
        from openvino.opset6 import assign, read_value

        longest, shape = max(line.readers), list(line.source.get_shape())
        shape[line.axis] = longest
        chunk = line.source
        if longest:
            _require_float32(line.source)
            stored = read_value(name, openvino.Type.f32, openvino.PartialShape(shape))
            chunk = self.ops.concat([stored.output(0), line.source], axis=line.axis)
            sinks.append(assign(self._slices(chunk, line.axis, self.count, longest), name))
        for wait, readers in line.readers.items():
            output = line.source
            if wait:
                output = self._slices(chunk, line.axis, longest - wait, self.count).output(0)
            for reader in readers:
                reader.replace_source_output(output)
        return 4 * math.prod(shape)

    def _slices(self, tensor: Any, axis: int, first: int, count: int) -> Any:
        return self.ops.slice(tensor, np.array([first]), np.array([first + count]), np.array([1]), np.array([axis]))


def _folded(network: Any, shape: Shape) -> Any:
    """A copy for images of one shape. Values that do not depend on the image become constants."""
    from openvino.passes import ConstantFolding, Manager

    graph = network.clone()
    graph.reshape(list(shape))
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(graph)
    return graph


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_friendly_name(), output.get_index()


def _depth_step(node: Any, axis: int) -> int:
    """+1: a shift from the slice before; -1: a shift from the slice after; 0: no depth shift."""
    if node.get_type_name() != "Pad" or node.get_attributes()["pad_mode"] != "constant":
        return 0
    before, after = _vector(node, 1), _vector(node, 2)
    step = before[axis]
    expected = [step if k == axis else 0 for k in range(len(before))]
    zeros = node.get_input_size() == 3 or _vector(node, 3) == [0]
    return step if abs(step) == 1 and zeros and before == expected == [-k for k in after] else 0


def _vector(node: Any, index: int) -> list[int]:
    source = node.input_value(index).get_node()
    if source.get_type_name() != "Constant":
        raise NotStreamableError(f"the axes of {node.get_type_name()} are not constant")
    return [int(value) for value in source.get_vector()]


def _require_float32(output: Any) -> None:
    if output.get_element_type().get_type_name() != "f32":
        raise NotStreamableError(f"a tensor of type {output.get_element_type().get_type_name()} cannot be stored")


class DepthStream:
    """A compiled stream. Chunks of a volume go in one after the other; logits come out `lag` slices later."""

    def __init__(self, compiled: Any, lag: int) -> None:
        self._request = compiled.create_infer_request()
        self.lag = lag

    def __call__(self, chunk: Float32, first: int, depth: int) -> Float32:
        """Logits (1, K, n, H, W) of slices first - lag to first - lag + n - 1; ignore those outside the volume.

        Args:
            chunk: (1, C, n, H, W), n slices beginning with `first`, zeros beyond the volume. The first chunk of a
                volume has `first` 0. Each other chunk follows the chunk before.
            depth: number of slices of the volume.
        """
        if first == 0:
            self._request.reset_state()
        slices = np.arange(first - self.lag, first + chunk.shape[2])
        valid = (slices >= 0) & (slices < depth)
        result = self._request.infer(
            [np.ascontiguousarray(chunk, dtype=np.float32), valid], share_inputs=False, share_outputs=True
        )
        return np.array(result[0], dtype=np.float32)
