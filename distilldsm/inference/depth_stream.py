"""An OpenVINO network that takes a volume a few slices at a time and remembers what its depth shifts need.

In windows of slices, those near both ends are computed for their neighbours' sake only: of a window of 26 slices with a
halo of 8, ten are kept. Here every slice is computed once. A depth shift needs the slice after, so what leaves it lags
one slice behind what enters, and the logits lag behind the image by the number of shifts in a row. Where branches with
different lags meet (skip connections), the one ahead waits. What waits is kept in variables of the compiled network.

The graph is made from the exported one, whatever network it came from. A shift is a padding by one slice at one end and
by minus one at the other (`masked_depth_shift`); every other operation must be one that is known to keep slices apart,
or the network is refused. So that nothing depends on how many slices come at a time, the graph is looked at for two
very different numbers of them: the depth is the one axis in which a tensor differs. Slices outside the volume are zero
where they enter a shift, as in the padding it replaces. INT8 is refused: among other neighbours, OpenVINO rounds its
layers elsewhere, and a hundredth of the labels of a random network changes.
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
"""(1, C, slices at a time, H, W)."""

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
"""Operations along some axes, and which of their inputs says which."""
MANY = 1009
"""Slices more, for the second look at a graph."""


class NotStreamableError(ValueError):
    """The network has an operation whose reach along the depth is not known, or nothing that reaches along it."""


@dataclass(frozen=True)
class StreamGraph:
    """model: an `openvino.Model` from (image (1, C, n, H, W), valid (n + lag,)) to logits (1, K, n, H, W).

    lag: slices that the logits are behind; state_bytes: float32 features that are kept from call to call.
    """

    model: Any
    lag: int
    state_bytes: int


@dataclass
class _Tensor:
    """A tensor of the graph: slice t of it is slice t - wait of `source`, and comes `lag` slices late."""

    source: Any
    axis: int
    """Of the depth."""
    wait: int = 0
    lag: int = 0
    zero_outside: bool = False


@dataclass
class _Line:
    """A tensor that some readers get later than it is computed: from how many slices later to the readers."""

    source: Any
    axis: int
    readers: dict[int, list[Any]] = field(default_factory=dict)


def stream_graph(network: Any, shape: Shape) -> StreamGraph:
    """Rewrite an exported network (`openvino.Model`, left as it is) for chunks of a volume.

    Args:
        shape: of one chunk.

    Raises:
        NotStreamableError: see there; also a network without any depth shift, which has nothing to remember.
    """
    try:
        return _Rewriting(network, shape).result()
    except RuntimeError as error:  # OpenVINO's: of shapes that do not fit, of types
        raise NotStreamableError(str(error)) from None


class _Rewriting:
    """One walk through a graph, from the image to the logits, that notes what has to wait; then the delays go in."""

    def __init__(self, network: Any, shape: Shape) -> None:
        import openvino.opset13 as ops

        self.ops = ops
        self.count = shape[2]
        named = network.clone()
        # Names tell the operations apart; those of a file need not be unique.
        for k, node in enumerate(named.get_ordered_ops()):
            node.set_friendly_name(f"{node.get_type_name()}_{k}")
        self.graph = _folded(named, shape)
        longer = _folded(named, (*shape[:2], shape[2] + MANY, *shape[3:]))
        self.longer = {node.get_friendly_name(): node for node in longer.get_ordered_ops()}
        self.known: dict[tuple[str, int], _Tensor] = {}
        self.lines: dict[tuple[str, int], _Line] = {}
        self.chosen: dict[tuple[int, int, int], list[Any]] = {}
        """Selections that zero what is outside the volume, by lag, axis and rank of what they zero; masks come last."""

    def result(self) -> StreamGraph:
        import openvino

        if len(self.graph.get_results()) != 1:
            raise NotStreamableError("one output is wanted")
        for node in self.graph.get_ordered_ops():
            if node.get_type_name() == "Parameter":
                self.known[_key(node.output(0))] = _Tensor(node.output(0), axis=2)
            elif any(_key(source) in self.known for source in node.input_values()):
                self._follow(node)
        if not self.chosen:
            raise NotStreamableError("no depth shift was found")
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
        """Note what a node's outputs are, and what its inputs have to wait for."""
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
        """The axis that is longer where the volume is."""
        other = self.longer.get(node.get_friendly_name())
        shape = list(output.get_shape())
        longer = list(other.output(output.get_index()).get_shape()) if other is not None else []
        differ = [k for k, (a, b) in enumerate(zip(shape, longer, strict=False)) if a != b]
        if len(shape) != len(longer) or len(differ) != 1 or shape[differ[0]] != self.count:
            raise NotStreamableError(f"{node.get_type_name()} may mix slices")
        return differ[0]

    def _require_slicewise(self, node: Any, axes: list[int], axis: int) -> None:
        """Raise NotStreamableError unless slice t of the output depends on slice t of the inputs alone.

        axes, axis: of the depth in the inputs that have one, and in the output.
        """
        kind, shape, out = node.get_type_name(), list(node.get_input_shape(0)), list(node.get_output_shape(0))
        rules: Mapping[str, Callable[[], bool]] = {
            "MatMul": lambda: len(axes) == 1 and axis == axes[0] < len(shape) - 1 and len(out) == len(shape),
            "Pad": lambda: axis == axes[0] and not _vector(node, 1)[axis] and not _vector(node, 2)[axis],
            "Transpose": lambda: _vector(node, 1)[axis] == axes[0],
            # In the order of memory, as many values come before a slice.
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
        # What a network computes from the number of slices means another thing in a chunk; of shapes, it is looked at.
        if not fits or not (kind in ("Reshape", "Interpolate") or self._same_constants(node)):
            raise NotStreamableError(f"{kind} may mix slices")

    def _is_known(self, node: Any, index: int) -> bool:
        return _key(node.input_value(index)) in self.known

    def _same_constants(self, node: Any) -> bool:
        other = self.longer[node.get_friendly_name()]
        for k in range(node.get_input_size()):
            if not self._is_known(node, k):
                one, two = (n.input_value(k).get_node() for n in (node, other))
                if not one.get_type_name() == two.get_type_name() == "Constant":
                    return False
                if not np.array_equal(one.data, two.data):
                    return False
        return True

    def _shifted(self, reader: Any, step: int) -> _Tensor:
        """The tensor that a shift gives, of a source that is zero outside the volume from here on."""
        key = _key(reader.get_source_output())
        tensor = self.known[key]
        if not tensor.zero_outside:
            if key != _key(tensor.source):
                raise NotStreamableError("a shift of a shift, with nothing between")
            _require_float32(tensor.source)
            rank = len(tensor.source.get_shape())
            selection = self.ops.select(np.ones((1,) * rank, dtype=bool), tensor.source, np.float32(0))
            selection.set_friendly_name(f"inside_{key[0]}_{key[1]}")
            self.chosen.setdefault((tensor.lag, tensor.axis, rank), []).append(selection)
            # Those that read it from here on take this, too: they read the same slices, and one line serves all.
            tensor.source, tensor.zero_outside = selection.output(0), True
        return _Tensor(tensor.source, tensor.axis, tensor.wait + (step == 1), tensor.lag + (step == -1))

    def _delay(self, line: _Line, name: str, sinks: list[Any]) -> int:
        """Give a tensor's readers what they wait for; returns the bytes that are kept for them."""
        import openvino
        from openvino.opset6 import assign, read_value

        longest, shape = max(line.readers), list(line.source.get_shape())
        shape[line.axis] = longest
        chunk = line.source
        if longest:
            _require_float32(line.source)
            kept = read_value(name, openvino.Type.f32, openvino.PartialShape(shape))
            chunk = self.ops.concat([kept.output(0), line.source], axis=line.axis)
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
    """A copy for images of one shape; all that does not depend on the image is a constant of it."""
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
    """+1: the features of the slice before, -1: of the slice after, 0: no depth shift."""
    if node.get_type_name() != "Pad" or node.get_attributes()["pad_mode"] != "constant":
        return 0
    before, after = _vector(node, 1), _vector(node, 2)
    step = before[axis]
    wanted = [step if k == axis else 0 for k in range(len(before))]
    zeros = node.get_input_size() == 3 or _vector(node, 3) == [0]
    return step if abs(step) == 1 and zeros and before == wanted == [-k for k in after] else 0


def _vector(node: Any, index: int) -> list[int]:
    source = node.input_value(index).get_node()
    if source.get_type_name() != "Constant":
        raise NotStreamableError(f"{node.get_type_name()} over axes that are computed")
    return [int(value) for value in source.get_vector()]


def _require_float32(output: Any) -> None:
    if output.get_element_type().get_type_name() != "f32":
        raise NotStreamableError(f"{output.get_element_type().get_type_name()} would have to wait")


class DepthStream:
    """A compiled stream: chunks of a volume go in one after the other, logits come out `lag` slices later."""

    def __init__(self, compiled: Any, lag: int) -> None:
        self._request = compiled.create_infer_request()
        self.lag = lag

    def __call__(self, chunk: Float32, first: int, depth: int) -> Float32:
        """Logits (1, K, n, H, W) of slices first - lag to first - lag + n - 1; outside the volume they mean nothing.

        Args:
            chunk: (1, C, n, H, W), slices from `first` on, zeros beyond the volume. The first chunk of a volume has
                `first` 0, each of the others follows the one before.
            depth: slices of the volume.
        """
        if first == 0:
            self._request.reset_state()
        slices = np.arange(first - self.lag, first + chunk.shape[2])
        valid = (slices >= 0) & (slices < depth)
        result = self._request.infer(
            [np.ascontiguousarray(chunk, dtype=np.float32), valid], share_inputs=False, share_outputs=True
        )
        return np.array(result[0], dtype=np.float32)
