"""A training that starts from given weights instead of random ones."""

from __future__ import annotations

from pathlib import Path

from distilldsm.core.errors import DataError
from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.checkpoint import load_tensors


def load_initial_weights(network: SegmentationNetwork, path: Path, *, strict: bool = True) -> list[str]:
    """Start a network from a file's weights: its own, or those of the 2-D network without depth shift modules.

    Args:
        strict: every tensor of the network (of the 2-D network) must be in the file, in its shape, and no other.

    Returns:
        Names of the tensors that stay as they were.

    Raises:
        DataError: a damaged file, or tensors that do not fit, with their names; not strict: if none fits.
    """
    found, _ = load_tensors(path)
    own = network.state_dict()
    # Of the two ways to name the tensors, the one that more of the file's names follow.
    names = max(
        {name: name for name in own}, network.flat_names(), key=lambda n: (len(n.keys() & found.keys()), -len(n))
    )
    shapes = {k: f"{k} {tuple(found[k].shape)} for {tuple(own[n].shape)}" for k, n in names.items() if k in found}
    other = {k: told for k, told in shapes.items() if found[k].shape != own[names[k]].shape}
    fitting = {names[k]: found[k] for k in shapes.keys() - other.keys()}
    missing, unknown = names.keys() - found.keys(), found.keys() - names.keys()
    problems = [
        f"{len(one)} {what}: {', '.join(sorted(one)[:3])}"
        for what, one in (("in another shape", other.values()), ("missing", missing), ("not of the network", unknown))
        if one
    ]
    if (strict and problems) or not fitting:
        raise DataError(
            "does not fit the network it is to start",
            where=path,
            seen="; ".join(problems)[:500] or "no tensors",
            rule="train.initial_weights holds the tensors of train.model, or of its 2-D network without depth shifts",
            hint="give the weights of such a network, or take those that fit with train.initial_weights_strict: false",
        )
    network.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]
