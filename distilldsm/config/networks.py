"""The networks as data: names, options with defaults and rules. Nothing here imports a network.

To add a network, add an entry to `MODELS` and a module `distilldsm/models/FAMILY.py` with a function `build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from distilldsm.core.errors import ConfigError, did_you_mean
from distilldsm.core.mapping import Count, Natural, Positive, Rule, Share, convert

Scalar = bool | int | float | str
Options = Mapping[str, Scalar | tuple[Scalar, ...] | Mapping[str, Scalar | tuple[Scalar, ...] | None]]
"""Options of a network, as stored in `params.yaml` and in the files of a model."""


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """What is known about a network before it is built."""

    summary: str
    family: str
    """The module of `distilldsm.models` that builds it: `unet2d` (slices, with or without depth shift), `unet3d`, or
    `inserted` (a 2-D network of the user's)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that define the variant; a user cannot change them."""
    options: Mapping[str, Any]
    """Options that a user may set, with their defaults."""


_SHIFT = {"shift_at": "all", "initialisation": "paper"}

MODELS: Mapping[str, ModelEntry] = {
    "unet2d": ModelEntry(
        summary="2-D U-Net: each slice is segmented by itself",
        family="unet2d",
        fixed={"shift": "none"},
        options={"width": 1.0},
    ),
    "residual_dsm": ModelEntry(
        summary="2-D U-Net with a parameter-free depth shift; 'add' adds the unshifted features back",
        family="unet2d",
        fixed={"shift": "residual"},
        options={"width": 1.0, "fraction": 0.5, "add": True, **_SHIFT},
    ),
    "distill_dsm": ModelEntry(
        summary="Distill DSM: 2-D U-Net whose slices exchange distilled features",
        family="unet2d",
        fixed={"shift": "distill"},
        options={"width": 1.0, "alpha": 0.5, **_SHIFT},
    ),
    "distill_dsm_m": ModelEntry(
        summary="Distill DSM with 1.5 times the paper's widths",
        family="unet2d",
        fixed={"shift": "distill"},
        options={"width": 1.5, "alpha": 0.5, **_SHIFT},
    ),
    "distill_dsm_l": ModelEntry(
        summary="Distill DSM with twice the paper's widths",
        family="unet2d",
        fixed={"shift": "distill"},
        options={"width": 2.0, "alpha": 0.5, **_SHIFT},
    ),
    "unet3d": ModelEntry(
        summary="the paper's 3-D baseline: residual, pre-activation, GroupNorm",
        family="unet3d",
        options={"base_width": 8},
    ),
    "inserted": ModelEntry(
        summary="your own 2-D network ('builder': package.module:function) with inserted depth shifts",
        family="inserted",
        options={
            "builder": "",
            "arguments": {},
            "in_argument": "in_channels",
            "out_argument": "out_channels",
            "stride": 32,
            "kind": "distill",
            "alpha": 0.5,
            "where": "auto",
            "initialisation": "identity",
        },
    ),
}


MODEL_NAMES = tuple(MODELS)
OPTION_TYPES: Mapping[str, Any] = {
    "width": Positive,
    "alpha": Share,
    "fraction": Share,
    "add": bool,
    "base_width": Count,
    "stride": Count,
    "initialisation": Literal["paper", "identity"],
    "shift_at": Annotated[
        Literal["all", "encoder", "decoder"] | tuple[Natural, ...],
        Rule("all, encoder, decoder, or a list of levels from 0 (full resolution)"),
    ],
    "kind": Literal["distill", "residual", "shift"],
    "where": Annotated[str | tuple[str, ...], Rule("auto, or patterns of module names", pattern=".+")],
    "builder": Annotated[
        str, Rule("package.module:function, e.g. monai.networks.nets:BasicUNet", pattern=r"[^:]+:[^:]+(:.*)?")
    ],
    "arguments": Annotated[Mapping[str, Any], Rule("a mapping, e.g. {spatial_dims: 2}")],
    "in_argument": Annotated[str, Rule("a name", pattern=r".+")],
    "out_argument": Annotated[str, Rule("a name", pattern=r".+")],
}
"""Option to its type; types are annotated as in the parameter dataclasses."""


def checked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a network, converted to their types. Nothing is built, so torch is not imported.

    Raises:
        ConfigError: unknown network or option, impossible value, or a missing option that must be given.
    """
    if name not in MODELS:
        raise ConfigError(
            "'name' is not a known network",
            seen=repr(name),
            rule="one of " + ", ".join(MODELS),
            hint=did_you_mean(name, MODELS),
        )
    known = MODELS[name].options
    for key in options:
        if key not in known:
            raise ConfigError(
                f"unknown parameter '{key}' of network '{name}'",
                where="options",
                rule="allowed: " + ", ".join(known),
                hint=f"remove it; `distilldsm compose --keep model={name}` sets network and options together",
            )
    needed = {"builder": ""} if "builder" in known else {}
    return {key: convert(OPTION_TYPES[key], value, f"options.{key}") for key, value in {**needed, **options}.items()}
