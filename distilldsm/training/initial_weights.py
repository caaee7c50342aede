"""Start a training from the weights in a file instead of random weights."""

from __future__ import annotations

from pathlib import Path

from distilldsm.core.errors import DataError
from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.checkpoint import load_tensors


def load_initial_weights(network: SegmentationNetwork, path: Path, *, strict: bool = True) -> list[str]:
    """Load weights from a file: the network's own, or those of the 2-D network without depth shift modules.

    Args:
        strict: the file must hold every tensor of the network (or of the 2-D network) in its shape, and no others.

    Returns:
        Names of the tensors that are not in the file and keep their random initial values.

    Raises:
        DataError: the file is damaged, or tensors do not fit (with their names). Not strict: only if no tensor fits.
    """
    tensors, _ = load_tensors(path)
    state = network.state_dict()
    # There are two ways to name the tensors. Use the way that matches more names in the file.
    names = max(
        {name: name for name in state}, network.flat_names(), key=lambda n: (len(n.keys() & tensors.keys()), -len(n))
    )
    shapes = {k: f"{k} {tuple(tensors[k].shape)} for {tuple(state[n].shape)}" for k, n in names.items() if k in tensors}
    misshapen = {k: text for k, text in shapes.items() if tensors[k].shape != state[names[k]].shape}
    fitting = {names[k]: tensors[k] for k in shapes.keys() - misshapen.keys()}
    missing, unknown = names.keys() - tensors.keys(), tensors.keys() - names.keys()
    kinds = (("in another shape", misshapen.values()), ("missing", missing), ("not of the network", unknown))
    problems = [f"{len(many)} {kind}: {', '.join(sorted(many)[:3])}" for kind, many in kinds if many]
    if (strict and problems) or not fitting:
        raise DataError(
            "does not fit the network",
            where=path,
            seen="; ".join(problems)[:500] or "no tensors",
            rule="train.initial_weights holds the tensors of train.model, or of its 2-D network without depth shifts",
            hint="give the weights of such a network, or load what fits with train.initial_weights_strict: false",
        )
    network.load_state_dict(fitting, strict=False)
    return [name for name in state if name not in fitting]
