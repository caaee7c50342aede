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
    """The network."""

    name: str = "distill_dsm"
    """Name of the network; `distilldsm info --models` lists them."""
    options: Options = field(default_factory=dict)
    """Options of that network, e.g. {alpha: 0.5}. For `inserted`, see docs/any-2d-network.md."""

    def __post_init__(self) -> None:
        checked_options(self.name, self.options)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training patch, drawn again for each sample."""

    spatial_probability: Share = 0.5
    """Share of samples that are rotated and scaled."""
    rotation_deg: Degrees | None = None
    """Largest rotation about the depth axis, degrees. null: the plan decides: 15, or 30 if slices are coarse."""
    tilt_deg: Degrees | None = None
    """Largest rotation about the two in-plane axes, degrees. null: 10, or 0 if the plan says that slices are coarse."""
    scale: Annotated[float, Range(0, 0.9, below=True)] = 0.2
    """Largest relative change of size. 0.2 draws factors from 0.8 to 1.2."""
    elastic_probability: Share = 0.0
    """Share of samples that are deformed elastically."""
    elastic_mm: NotNegative = 2.0
    """Standard deviation of the displacement at five control points along each axis of a patch, mm."""
    intensity_probability: Share = 0.2
    """Share of samples with changed contrast, brightness, gamma, noise or blur. Each of the five is drawn by itself."""
    low_resolution_probability: Share = 0.0
    """Share of samples, drawn for each channel, that are resampled to a lower resolution (down to half) and back."""
    mirror_axes: tuple[MirrorAxis, ...] = ()
    """Axes to flip at random (depth, height, width). Use only axes along which the anatomy is symmetric. Depth is the
    plan's depth axis; height and width are the others, in the order x (left to right), y (back to front), z (bottom to
    top)."""

    def largest_rotation(self, *, coarse_slices: bool) -> float:
        """`rotation_deg`; if it is null, 15, or 30 for slices that are not tilted."""
        if self.rotation_deg is not None:
            return self.rotation_deg
        return 15.0 if self.largest_tilt(coarse_slices=coarse_slices) else 30.0

    def largest_tilt(self, *, coarse_slices: bool) -> float:
        """`tilt_deg`; if it is null, 10 or 0. Coarse slices are not tilted: that would mix several slices in one."""
        if self.tilt_deg is not None:
            return self.tilt_deg
        return 0.0 if coarse_slices else 10.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    initial_weights: str | None = None
    """Path of a .safetensors file to start from. It holds weights of an earlier training, or of the 2-D network alone.
    If they were trained on cases that are held out here, the scores look better than they are."""
    initial_weights_strict: bool = True
    """Whether every tensor must fit. `false`: missing tensors, and those of another shape (e.g. another number of
    classes), are listed and keep their random initial values."""
    budget: Positive = 2e9
    """Voxels that a training sees (patches x voxels of a patch): about an hour on two cores. The plan chooses spacing,
    patch and length for it. `distilldsm budget "60 min"` measures what this machine sees in that time."""
    epochs: Count | None = None
    """Passes over the training cases. null: the plan decides, from `budget`."""
    samples_per_case: Count | None = None
    """Patches drawn from each case in one epoch. null: the plan decides; 1 if `epochs` is set."""
    batch_size: Count | None = None
    """Patches per optimizer step over all processes. null: the plan decides."""
    accumulate: Count = 1
    """Number of smaller batches that each step's batch is split into, to save memory. Must divide `batch_size`."""
    foreground_oversampling: Share | None = None
    """Share of patches centred on a voxel of a foreground label. null: the plan decides."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """The optimizer."""
    learning_rate: Positive | None = None
    """Peak learning rate. null: the plan decides."""
    weight_decay: NotNegative = 1e-2
    """Weight decay: decoupled for adamw, else an L2 penalty. Biases and normalisation layers have none."""
    momentum: float = 0.99
    """Momentum of sgd (Nesterov)."""
    schedule: Literal["one_cycle", "cosine", "poly", "plateau", "constant"] = "one_cycle"
    """How the learning rate changes over the steps."""
    warmup_fraction: BelowOne = 0.2
    """Share of all steps with a rising rate (one_cycle, cosine)."""
    dice_weight: NotNegative = 1.0
    """Weight of the soft Dice loss."""
    cross_entropy_weight: NotNegative = 1.0
    """Weight of the cross-entropy, binary where regions overlap."""
    deep_supervision: Annotated[int, Range(0, 3)] = 2
    """Number of lower decoder levels that get their own head and loss in training. Each level has half the weight of
    the one above; these heads are not part of the final model."""
    gradient_clip_norm: NotNegative = 12.0
    """Largest norm of the gradient. 0 switches clipping off."""
    ema_decay: BelowOne | None = None
    """Decay per step of the averaged weights. They are validated and exported; 0 switches averaging off. null: the
    plan decides."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the forward pass. `auto`: bf16 autocast if the hardware has it (GPU, AVX-512 BF16, AMX)."""
    channels_last: bool = True
    """Use the channels-last memory layout for 2-D networks. It is faster on CPUs and GPUs."""
    compile: bool = False
    """Use torch.compile. Worth it on GPUs for long runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. `auto`: a GPU if there is one."""
    workers: Natural = 0
    """Loader processes per training process. 0 loads in the training process."""
    validate_every: Count | None = None
    """Epochs between validations on the fold's held-out volumes. The last epoch is always validated. null: an eighth of
    the epochs."""
    early_stopping: Natural = 0
    """Stop after this many validations without a better mean Dice. 0: never; otherwise the held-out fold decides, which
    makes scores optimistic."""
    checkpoint_minutes: NotNegative = 2.0
    """Least time between two checkpoints for resuming, minutes. They are written at the end of an epoch."""
    deterministic: bool = True
    """Same seed and same machine give the same weights."""
    seed: Natural = 0
    """Seed of weights, patches and augmentation."""

    def __post_init__(self) -> None:
        require(
            self.batch_size is None or self.batch_size % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"must divide batch_size ({self.batch_size})",
        )
        require(
            self.dice_weight + self.cross_entropy_weight > 0,
            "dice_weight, cross_entropy_weight",
            (self.dice_weight, self.cross_entropy_weight),
            "not both 0",
        )
