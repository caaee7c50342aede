"""Section `train` of `params.yaml`: network, augmentation, loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from distilldsm.config.networks import Options, checked_options
from distilldsm.core.mapping import Count, Natural, NotNegative, Positive, Range, Share, require

MirrorAxis = Literal["depth", "height", "width"]
Degrees = Annotated[float, Range(0, 180)]
BelowOne = Annotated[float, Range(0, 1, below=True)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    name: str = "distill_dsm"
    """A network, see `distilldsm info --models`."""
    options: Options = field(default_factory=dict)
    """Options of that network, e.g. {alpha: 0.5}. For `inserted`, the code that makes it: docs/any-2d-network.md."""

    def __post_init__(self) -> None:
        checked_options(self.name, self.options)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training patch; each is drawn anew per sample."""

    spatial_probability: Share = 0.5
    """Share of samples that are rotated and scaled."""
    rotation_deg: Degrees = 15.0
    """Largest rotation about the depth axis, degrees."""
    tilt_deg: Degrees | None = None
    """Largest rotation about the two in-plane axes, degrees. null: 10, and 0 where the plan calls the slices coarse."""
    scale: Annotated[float, Range(0, 0.9, below=True)] = 0.2
    """Largest relative change of size. 0.2 draws factors from 0.8 to 1.2."""
    elastic_probability: Share = 0.0
    """Share of samples that are bent."""
    elastic_mm: NotNegative = 2.0
    """Standard deviation of the displacement at five control points along each axis of a patch, mm."""
    intensity_probability: Share = 0.2
    """Share of samples whose contrast, brightness, gamma, noise and blur change, each on its own."""
    low_resolution_probability: Share = 0.0
    """Share of samples, channel by channel, that are coarsened by up to a factor of two and brought back."""
    mirror_axes: tuple[MirrorAxis, ...] = ()
    """Axes to flip at random (depth, height, width), only where anatomy allows. Depth is the plan's depth axis; height
    and width are the other two in the order x (left to right), y (back to front), z (bottom to top)."""

    def largest_tilt(self, *, coarse_slices: bool) -> float:
        """`tilt_deg`; where it is null, what fits the plan: tilted, coarse slices would be mixtures of several."""
        if self.tilt_deg is not None:
            return self.tilt_deg
        return 0.0 if coarse_slices else 10.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    initial_weights: str | None = None
    """Path of a .safetensors to start from. Weights of an earlier training, or of the 2-D network alone. If they were
    trained on cases that are held out here, the scores look better than they are."""
    initial_weights_strict: bool = True
    """Whether every tensor must fit. `false`: tensors that the file lacks, or has in another shape (another number of
    classes), are listed and keep their random initial values."""
    epochs: Count = 30
    """Passes over the training cases."""
    samples_per_case: Count = 1
    """Patches drawn from each case in one epoch."""
    batch_size: Count | None = None
    """Patches per optimizer step over all processes. null: the plan's."""
    accumulate: Count = 1
    """Splits each step's batch into this many smaller ones, to save memory. Must divide `batch_size`."""
    foreground_oversampling: Share = 0.33
    """Share of patches centred on a voxel of a foreground label."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """The optimizer."""
    learning_rate: Positive = 4e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 1e-2
    """Decoupled for adamw, else an L2 penalty. Biases and normalisation layers have none."""
    momentum: float = 0.99
    """For sgd (Nesterov)."""
    schedule: Literal["one_cycle", "cosine", "poly", "plateau", "constant"] = "one_cycle"
    """How the learning rate changes over the steps."""
    warmup_fraction: BelowOne = 0.2
    """Share of all steps with a rising rate (one_cycle, cosine)."""
    dice_weight: NotNegative = 1.0
    """Weight of the soft Dice loss."""
    cross_entropy_weight: NotNegative = 1.0
    """Weight of the cross-entropy, binary where regions overlap."""
    deep_supervision: Annotated[int, Range(0, 3)] = 2
    """Lower decoder levels that are trained with a head and a loss of their own. Each has half the weight of the one
    above; the heads are not part of the model."""
    gradient_clip_norm: NotNegative = 12.0
    """Largest norm of the gradient. 0 switches clipping off."""
    ema_decay: BelowOne = 0.98
    """Decay per step of the averaged weights, which are validated and exported. 0 switches averaging off."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the forward pass. `auto`: bf16 autocast where the hardware has it (GPU, AVX-512 BF16, AMX)."""
    channels_last: bool = True
    """Memory layout of the 2-D networks: faster on CPUs and GPUs."""
    compile: bool = False
    """Use torch.compile. Worth it on GPUs for long runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. `auto`: a GPU if there is one."""
    workers: Natural = 0
    """Loader processes per training process. 0 loads in the training process."""
    validate_every: Count = 5
    """Epochs between validations on the fold's held-out volumes. The last epoch is always validated."""
    early_stopping: Natural = 0
    """Stop after this many validations without a better mean Dice; 0 never stops. Chooses on the held-out fold."""
    checkpoint_minutes: NotNegative = 2.0
    """Least time between two checkpoints to resume from, minutes. They are written at the end of an epoch."""
    deterministic: bool = True
    """Same seed, same machine, same weights."""
    seed: Natural = 0
    """Seed of weights, patches and augmentation."""

    def __post_init__(self) -> None:
        require(
            self.batch_size is None or self.batch_size % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"divides batch_size ({self.batch_size})",
        )
        require(
            self.dice_weight + self.cross_entropy_weight > 0,
            "dice_weight, cross_entropy_weight",
            (self.dice_weight, self.cross_entropy_weight),
            "not both 0",
        )
