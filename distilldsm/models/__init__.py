"""Networks and model files. Importing this package loads no torch; building a network does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distilldsm.config.networks import MODELS, checked_options
from distilldsm.core.errors import ConfigError

if TYPE_CHECKING:
    from distilldsm.models.base import SegmentationNetwork


def build_model(name: str, *, in_channels: int, out_channels: int, **options: Any) -> SegmentationNetwork:
    """Build the network `name`; input and output are (B, C, D, H, W).

    Raises:
        ConfigError: an unknown name or option, an impossible value, or an error in the user's own builder.
    """
    options = checked_options(name, options)
    entry = MODELS[name]
    for key, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"'{key}' must be a whole number from 1", seen=repr(value))
    family = importlib.import_module(f"{__name__}.{entry.family}")
    arguments = {**entry.fixed, **entry.options, **options}
    network: SegmentationNetwork = family.build(in_channels, out_channels, **arguments)
    return network
