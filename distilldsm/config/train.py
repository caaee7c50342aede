"""The parameters of the training: network, augmentation, loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distilldsm.config.networks import MODEL_NAMES, Options, check_options
from distilldsm.core.errors import ConfigError, did_you_mean
from distilldsm.core.mapping import require

MirrorAxis = Literal["depth", "height", "width"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    name: str = "distill_dsm"
    """A name from the registry (`distilldsm info --models`)."""
    options: Options = field(default_factory=dict)
    """Options of that network, e.g. `alpha: 0.5`; of `inserted`, the code that makes it: docs/any-2d-network.md."""

    def __post_init__(self) -> None:
        if self.name not in MODEL_NAMES:
            raise ConfigError(
                "'name' is no known model",
                seen=repr(self.name),
                rule="one of " + ", ".join(MODEL_NAMES),
                hint=did_you_mean(self.name, MODEL_NAMES),
            )
        check_options(self.name, self.options)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training patch; each is drawn anew per sample."""

    spatial_probability: float = 0.5
    """Share of samples that are rotated and scaled."""
    rotation_deg: float = 15.0
    """Largest rotation about the depth axis, degrees."""
    tilt_deg: float | None = None
    """Largest rotation about the two in-plane axes, degrees; null: 10, and 0 where the plan calls the slices coarse."""
    scale: float = 0.2
    """Largest relative change of size: 0.2 draws factors from 0.8 to 1.2."""
    elastic_probability: float = 0.0
    """Share of samples that are bent."""
    elastic_mm: float = 2.0
    """Standard deviation of the displacement at five control points along each axis of a patch, mm."""
    intensity_probability: float = 0.2
    """Share of samples whose contrast, brightness, gamma, noise and blur change (each on its own)."""
    low_resolution_probability: float = 0.0
    """Share of samples, channel by channel, that are coarsened by up to a factor of two and brought back."""
    mirror_axes: tuple[MirrorAxis, ...] = ()
    """Axes to flip at random; only where anatomy allows. Depth is the plan's depth axis; height and width are the other
    two in the order x (left to right), y (back to front), z (bottom to top)."""

    def __post_init__(self) -> None:
        for key in (
            "spatial_probability",
            "elastic_probability",
            "intensity_probability",
            "low_resolution_probability",
        ):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "from 0 to 1")
        require(0 <= self.scale < 0.9, "scale", self.scale, "from 0 to below 0.9")
        require(self.elastic_mm >= 0, "elastic_mm", self.elastic_mm, "0 or more, mm")
        for key in ("rotation_deg", "tilt_deg"):
            degrees = getattr(self, key)
            require(degrees is None or 0 <= degrees <= 180, key, degrees, "from 0 to 180 degrees")

    def largest_tilt(self, *, coarse_slices: bool) -> float:
        """`tilt_deg`, where it is left to the plan what fits: tilted, coarse slices would be mixtures of several."""
        if self.tilt_deg is not None:
            return self.tilt_deg
        return 0.0 if coarse_slices else 10.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    initial_weights: str | None = None
    """Path of a `.safetensors` to start from: weights of an earlier training, or of the 2-D network alone. If they were
    trained on cases that are held out here, the scores look better than they are."""
    initial_weights_strict: bool = True
    """Whether every tensor must fit. `false`: those that the file lacks, or has in another shape (another number of
    classes), are told and start as without the file."""
    epochs: int = 30
    """Passes over the training cases."""
    samples_per_case: int = 1
    """Patches drawn from each case in one epoch."""
    batch_size: int | None = None
    """Patches per optimizer step over all processes; by default the plan's."""
    accumulate: int = 1
    """Splits each step's batch into so many smaller ones, for little memory."""
    foreground_oversampling: float = 0.33
    """Share of patches centred on a voxel of a foreground label."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """The optimizer."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    weight_decay: float = 1e-2
    """Decoupled for adamw, else an L2 penalty; biases and normalisation layers have none."""
    momentum: float = 0.99
    """For sgd (Nesterov)."""
    schedule: Literal["one_cycle", "cosine", "poly", "plateau", "constant"] = "one_cycle"
    """How the learning rate goes over the steps."""
    warmup_fraction: float = 0.2
    """Share of all steps with a rising rate (one_cycle, cosine)."""
    dice_weight: float = 1.0
    """Weight of the soft Dice loss."""
    cross_entropy_weight: float = 1.0
    """Weight of the cross-entropy (binary where regions overlap)."""
    deep_supervision: int = 2
    """Decoder levels below the full resolution that are trained with a head and a loss of their own, each with half the
    weight of the one above; the heads are not part of the model."""
    gradient_clip_norm: float = 12.0
    """Largest norm of the gradient; 0 switches clipping off."""
    ema_decay: float = 0.98
    """Decay per step of the averaged weights, which are what is validated and exported; 0 switches it off."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 autocast where the hardware has it (GPU, AVX-512 BF16, AMX)."""
    channels_last: bool = True
    """Memory layout of the 2-D networks: faster on CPUs and GPUs."""
    compile: bool = False
    """torch.compile; worth it on GPUs for long runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    workers: int = 0
    """Loader processes per training process; 0 loads in the training process."""
    validate_every: int = 5
    """Epochs between validations on the fold's held-out volumes (the last epoch is always validated)."""
    early_stopping: int = 0
    """Stop after so many validations without a better mean Dice; 0 never stops. Chooses on the held-out fold."""
    checkpoint_minutes: float = 2.0
    """A resumable checkpoint is written at the end of an epoch, at most this often, minutes."""
    deterministic: bool = True
    """Same seed, same machine, same weights."""
    seed: int = 0
    """Of weights, patches and augmentation."""

    def __post_init__(self) -> None:
        for key in ("epochs", "samples_per_case", "accumulate", "validate_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(0 <= self.deep_supervision <= 3, "deep_supervision", self.deep_supervision, "from 0 to 3")
        for key in ("early_stopping", "workers", "gradient_clip_norm", "weight_decay", "checkpoint_minutes", "seed"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        if self.batch_size is not None:
            require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
            require(
                self.batch_size % self.accumulate == 0,
                "accumulate",
                self.accumulate,
                f"divides batch_size ({self.batch_size})",
            )
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "from 0 to below 1")
        require(0 <= self.warmup_fraction < 1, "warmup_fraction", self.warmup_fraction, "from 0 to below 1")
        require(
            0 <= self.foreground_oversampling <= 1,
            "foreground_oversampling",
            self.foreground_oversampling,
            "from 0 to 1",
        )
        require(
            self.dice_weight >= 0
            and self.cross_entropy_weight >= 0
            and self.dice_weight + self.cross_entropy_weight > 0,
            "dice_weight, cross_entropy_weight",
            (self.dice_weight, self.cross_entropy_weight),
            "0 or more, not both 0",
        )
