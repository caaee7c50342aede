"""An OpenVINO network that takes a volume a few slices at a time and remembers what its depth shifts need.

In windows of slices, those near both ends are computed for their neighbours' sake only: of a window of 26 slices with a
halo of 8, ten are kept. Here every slice is computed once. A depth shift needs the slice after, so what leaves it lags
one slice behind what enters, and the logits lag behind the image by the number of shifts in a row. Where branches with
different lags meet (skip connections), the one ahead waits. What waits is kept in variables of the compiled network.

The graph is made from the exported one, whatever network it came from: a shift is a padding by one slice at one end and
by minus one at the other (`masked_depth_shift`), every other operation works slice by slice or the network is refused.
All slices outside the volume are zero where they enter a shift, as in the padding it replaces. INT8 is refused: among
other neighbours, OpenVINO rounds its layers elsewhere, and a hundredth of the labels of a random network changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Shape = tuple[int, int, int, int, int]
"""(1, C, slices at a time, H, W)."""

STATIC = ("Constant", "ShapeOf")
# fmt: off
ELEMENTWISE = frozenset((
    "Abs", "Add", "Clamp", "Convert", "Divide", "Elu", "Exp", "Gelu", "HSigmoid", "HSwish", "Maximum",
    "Minimum", "Mish", "Multiply", "Negative", "PRelu", "Power", "Relu", "Select", "Selu", "Sigmoid", "SoftPlus",
    "Sqrt", "Subtract", "Swish", "Tanh",
))
IN_PLANE = frozenset((
    "AvgPool", "BatchNormInference", "Convolution", "ConvolutionBackpropData", "GroupConvolution", "MaxPool",
))
# fmt: on


class NotStreamableError(ValueError):
    """The network has an operation whose reach along the depth is not known."""


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
    wait: int
    lag: int
    zero_outside: bool = False


@dataclass
class _Line:
    """A tensor that some readers get later than it is computed: slices of wait to the readers."""

    source: Any
    readers: dict[int, list[Any]] = field(default_factory=dict)


def stream_graph(network: Any, shape: Shape) -> StreamGraph:
    """Rewrite an exported network (`openvino.Model`, left as it is) for chunks of a volume.

    Args:
        shape: of one chunk.

    Raises:
        NotStreamableError: see there; also a network without any depth shift, which has nothing to remember.
    """
    import openvino
    import openvino.opset13 as ops

    graph = network.clone()
    graph.reshape(list(shape))
    count = shape[2]
    # Names tell the operations apart; those of a file need not be unique.
    for k, node in enumerate(graph.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}_{k}")
    known: dict[tuple[str, int], _Tensor] = {}
    lines: dict[tuple[str, int], _Line] = {}
    inside: dict[int, list[Any]] = {}
    """Multiplications that zero what is outside the volume, by the lag of what they are for; their masks come last."""
    lag = 0
    if len(graph.get_results()) != 1:
        raise NotStreamableError("one output is wanted")
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Parameter":
            known[_key(node.output(0))] = _Tensor(node.output(0), 0, 0)
            continue
        readers = [entry for entry in node.inputs() if _key(entry.get_source_output()) in known]
        if node.get_type_name() in STATIC or not readers:
            continue
        tensors = [known[_key(entry.get_source_output())] for entry in readers]
        step = _depth_step(node)
        if step:
            known[_key(node.output(0))] = _shifted(ops, known, readers[0], step, inside, count)
            continue
        _require_slicewise(node, count)
        late = max(tensor.lag for tensor in tensors)
        lag = late if node.get_type_name() == "Result" else lag
        for entry, tensor in zip(readers, tensors, strict=True):
            line = lines.setdefault(_key(tensor.source), _Line(tensor.source))
            line.readers.setdefault(tensor.wait + late - tensor.lag, []).append(entry)
        for output in node.outputs():
            known[_key(output)] = _Tensor(output, 0, late)
    if not inside:
        raise NotStreamableError("no depth shift was found")

    valid = ops.parameter([count + lag], np.float32, name="valid")
    for behind, products in inside.items():
        mask = ops.reshape(_slices(ops, valid, lag - behind, count), np.array([count, 1, 1, 1]), special_zero=False)
        for product in products:
            product.input(1).replace_source_output(mask.output(0))
    state = 0
    sinks: list[Any] = []
    for k, line in enumerate(lines.values()):
        state += _delay(ops, openvino, line, f"waiting{k}", count, sinks)
    model = openvino.Model(graph.get_results(), sinks, [*graph.get_parameters(), valid], "depth_stream")
    return StreamGraph(model=model, lag=lag, state_bytes=state)


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_friendly_name(), output.get_index()


def _depth_step(node: Any) -> int:
    """+1: the features of the slice before, -1: of the slice after, 0: no depth shift."""
    if node.get_type_name() != "Pad" or node.get_attributes()["pad_mode"] != "constant":
        return 0
    before, after = _vector(node, 1), _vector(node, 2)
    if len(before) != 4 or any([*before[1:], *after[1:]]) or before[0] != -after[0] or abs(before[0]) != 1:
        return 0
    return before[0] if node.get_input_size() == 3 or _vector(node, 3) == [0] else 0


def _shifted(
    ops: Any, known: Mapping[tuple[str, int], _Tensor], reader: Any, step: int, inside: dict[int, list[Any]], count: int
) -> _Tensor:
    """The tensor that a shift gives, of a source that is zero outside the volume from here on."""
    key = _key(reader.get_source_output())
    tensor = known[key]
    if not tensor.zero_outside:
        if key != _key(tensor.source):
            raise NotStreamableError("a shift of a shift")
        product = ops.multiply(tensor.source, ops.constant(np.ones((count, 1, 1, 1), dtype=np.float32)))
        product.set_friendly_name(f"inside_{key[0]}_{key[1]}")
        inside.setdefault(tensor.lag, []).append(product)
        # Its other readers take it, too: they read the same slices, and one line serves all.
        tensor.source, tensor.zero_outside = product.output(0), True
    return _Tensor(tensor.source, tensor.wait + (step == 1), tensor.lag + (step == -1))


def _delay(ops: Any, openvino: Any, line: _Line, name: str, count: int, sinks: list[Any]) -> int:
    """Give a tensor's readers what they wait for; returns the bytes that are kept for them."""
    from openvino.opset6 import assign, read_value

    longest = max(line.readers)
    chunk = line.source
    if longest:
        shape = list(line.source.get_shape())
        if len(shape) != 4:
            raise NotStreamableError(f"a tensor with {len(shape)} axes would have to wait")
        shape[0] = longest
        kept = read_value(name, openvino.Type.f32, openvino.PartialShape(shape))
        chunk = ops.concat([kept.output(0), line.source], axis=0)
        sinks.append(assign(_slices(ops, chunk, count, longest), name))
    for wait, readers in line.readers.items():
        output = line.source if wait == 0 else _slices(ops, chunk, longest - wait, count).output(0)
        for reader in readers:
            reader.replace_source_output(output)
    return 4 * int(np.prod(shape)) if longest else 0


def _slices(ops: Any, tensor: Any, first: int, count: int) -> Any:
    return ops.slice(tensor, np.array([first]), np.array([first + count]), np.array([1]), np.array([0]))


def _require_slicewise(node: Any, count: int) -> None:
    """Raise NotStreamableError unless slice t of the output depends on slice t of the inputs alone."""
    kind, shapes = node.get_type_name(), [list(node.get_input_shape(k)) for k in range(node.get_input_size())]
    rules: Mapping[str, Callable[[], bool]] = {
        "Concat": lambda: len(shapes[0]) == 4 and node.get_attributes()["axis"] % 4 != 0,
        "Slice": lambda: len(shapes) == 5 and 0 not in [k % 4 for k in _vector(node, 4)],
        "MVN": lambda: len(shapes[0]) == 4 and 0 not in [k % 4 for k in _vector(node, 1)],
        "Pad": lambda: len(shapes[0]) == 4 and not _vector(node, 1)[0] and not _vector(node, 2)[0],
        "Split": lambda: _vector(node, 1)[0] % len(shapes[0]) != 0,
        "VariadicSplit": lambda: _vector(node, 1)[0] % len(shapes[0]) != 0,
        "Interpolate": lambda: len(shapes[0]) == 4,
        "ReduceMean": lambda: bool(node.get_attributes()["keep_dims"]) and 0 not in [k % 4 for k in _vector(node, 1)],
        # Between volumes, (1, C, n, H, W), and their slices, (n, C, H, W).
        "Transpose": lambda: len(shapes[0]) == 5 and _vector(node, 1) == [0, 2, 1, 3, 4],
        "Reshape": lambda: sorted((shapes[0], list(node.get_output_shape(0))), key=len) == _slices_and_volume(node),
        "Result": lambda: True,
    }
    if kind in ELEMENTWISE:
        # A constant that differs from slice to slice of a chunk would mean something else in another chunk.
        others = [s for k, s in enumerate(shapes) if node.input_value(k).get_node().get_type_name() == "Constant"]
        fits = all(len(shape) < 4 or shape[0] == 1 for shape in others)
    elif kind in IN_PLANE:
        fits = len(shapes[0]) == 4
    else:
        fits = kind in rules and rules[kind]()
    out = list(node.get_output_shape(0)) if kind != "Result" else shapes[0]
    if not fits or count not in (out[:1] if len(out) == 4 else out[1:3]):
        raise NotStreamableError(f"{kind} may mix slices")


def _slices_and_volume(node: Any) -> list[list[int]]:
    slices = min((list(node.get_input_shape(0)), list(node.get_output_shape(0))), key=len)
    return [slices, [1, *slices]]


def _vector(node: Any, index: int) -> list[int]:
    source = node.input_value(index).get_node()
    if source.get_type_name() != "Constant":
        raise NotStreamableError(f"{node.get_type_name()} over axes that are computed")
    return [int(value) for value in source.get_vector()]


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
        valid = ((slices >= 0) & (slices < depth)).astype(np.float32)
        result = self._request.infer(
            [np.ascontiguousarray(chunk, dtype=np.float32), valid], share_inputs=False, share_outputs=True
        )
        return np.array(result[0], dtype=np.float32)
