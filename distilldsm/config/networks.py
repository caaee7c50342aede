"""The networks as data: names, options with their defaults, rules. `distilldsm.models` builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distilldsm.core.errors import ConfigError

Scalar = bool | int | float | str
Options = Mapping[str, Scalar | tuple[Scalar, ...] | Mapping[str, Scalar | tuple[Scalar, ...] | None]]
"""Options of a network as `params.yaml` and the files of a model hold them."""


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A network of the registry: what it is called, what it is, its options with their defaults."""

    summary: str
    family: str
    """The module of `distilldsm.models` that builds it: `unet2d` (slices, with or without depth shift), `unet3d` or
    `inserted` (a 2-D network of the user's)."""
    fixed: Mapping[str, Any]
    """Arguments that make the variant what it is."""
    options: Mapping[str, Any]
    """Options a user may set, with their defaults."""


_SHIFT = {"shift_at": "all", "initialisation": "paper"}

MODELS: Mapping[str, ModelEntry] = {
    "unet2d": ModelEntry(
        summary="2-D U-Net: every slice on its own",
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
        fixed={},
        options={"base_width": 8},
    ),
    "inserted": ModelEntry(
        summary="a 2-D network of your own, 'builder' package.module:function, with depth shifts put into it",
        family="inserted",
        fixed={},
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_list_of(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(fits, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


_SHARE = (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
_NAME = (_is_name, "a name")
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "width": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "alpha": _SHARE,
    "fraction": _SHARE,
    "add": (lambda v: isinstance(v, bool), "true or false"),
    "base_width": (_is_count, "a whole number from 1"),
    "stride": (_is_count, "a whole number from 1"),
    "initialisation": (lambda v: v in ("paper", "identity"), "paper or identity"),
    "shift_at": (
        lambda v: v in ("all", "encoder", "decoder") or _is_list_of(v, lambda one: _is_count(one, 0)),
        "all, encoder, decoder, or a list of levels from 0 (full resolution)",
    ),
    "kind": (lambda v: v in ("distill", "residual", "shift"), "distill, residual or shift"),
    "where": (lambda v: _is_name(v) or _is_list_of(v, _is_name), "auto, or patterns of module names"),
    "builder": (
        lambda v: isinstance(v, str) and all(v.partition(":")),
        "package.module:function, e.g. monai.networks.nets:BasicUNet",
    ),
    "arguments": (lambda v: isinstance(v, Mapping), "a mapping, e.g. {spatial_dims: 2}"),
    "in_argument": _NAME,
    "out_argument": _NAME,
}
"""What an option must be, and how that is told."""


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check the options of a network without building it, which loads torch.

    Raises:
        ConfigError: an option that network `name` has not, an impossible value, or one that must be given is missing.
    """
    known = MODELS[name].options
    for key in options:
        if key not in known:
            raise ConfigError(
                f"model '{name}' has no option '{key}'",
                where="train.model.options",
                rule="allowed: " + ", ".join(known),
                hint=f"take it out; `distilldsm compose --keep model={name}` sets network and options together",
            )
    for key, value in options.items() if "builder" not in known else {"builder": "", **options}.items():
        fits, rule = _RULES[key]
        if not fits(value):
            raise ConfigError(
                f"option '{key}' has an impossible value", where="train.model.options", seen=repr(value), rule=rule
            )
