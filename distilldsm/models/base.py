"""What every network offers besides its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size and arithmetic of a network."""

    parameters: int
    macs_per_voxel: float
    """Multiply-accumulate operations of all convolutions (transposed ones included) per voxel of the input."""

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.macs_per_voxel:,.0f} convolution MACs per voxel"


class SegmentationNetwork(nn.Module):
    """A network from (B, C, D, H, W) images to (B, K, D, H, W) logits, for any B and D.

    stride: D, H and W must be multiples of these numbers. depth_halo: the logits of a slice depend on this many slices
    on each side (None: on the whole depth). `forward` takes the image. In training it also takes a list and fills it
    with the decoder's outputs (B, decoder_widths[k], d, h, w), from the coarsest to the finest.
    """

    stride: tuple[int, int, int] = (1, 1, 1)
    depth_halo: int | None = 0
    decoder_widths: tuple[int, ...] = ()

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is (B, in_channels, D, H, W) and D, H and W are multiples of the stride."""
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (B, {self.in_channels}, D, H, W), got {tuple(x.shape)}")
        if any(n % s for n, s in zip(x.shape[2:], self.stride, strict=True)):
            raise ValueError(f"sizes {tuple(x.shape[2:])} must be multiples of {self.stride}")

    def flat_names(self) -> dict[str, str]:
        """Map tensor names of the same network without depth shift modules to the names in this `state_dict`."""
        return {name: name for name in self.state_dict()}

    def cost(self) -> Cost:
        """Count the parameters. Count the MACs of the convolutions in one forward pass on a small volume."""
        size = tuple(-(-n // s) * s for n, s in zip((2, 32, 32), self.stride, strict=True))
        macs = 0

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal macs
            weight = module.weight
            assert isinstance(weight, Tensor)
            # A convolution uses each weight once per output position; a transposed one, once per input position.
            places = inputs[0] if isinstance(module, _TRANSPOSED) else output
            macs += places.numel() // places.shape[1] * weight.numel()

        hooks = [
            module.register_forward_hook(count)
            for module in self.modules()
            if isinstance(module, _CONVOLUTIONS + _TRANSPOSED)
        ]
        try:
            parameter = next(self.parameters())
            with evaluating(self):
                self(torch.zeros(1, self.in_channels, *size, device=parameter.device, dtype=parameter.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        voxels = size[0] * size[1] * size[2]
        return Cost(parameters=sum(p.numel() for p in self.parameters()), macs_per_voxel=macs / voxels)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards each module has its earlier mode again, frozen parts too."""
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
