"""Run the U-Net in PyTorch on a few slices at a time. depth_stream.py explains the method and does it for OpenVINO."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from distilldsm.inference.depth_stream import Float32
from distilldsm.models.depth_shift import DepthModule, DistillDepthShift, ResidualDepthShift
from distilldsm.models.insert import AddedDistillDepthShift, GatedDepthShift
from distilldsm.models.unet2d import Block, UNet2D, join, pool


class TorchStream:
    """Chunks of a volume go in one after the other; logits come out `lag` slices later.

    Each call runs the layers in the same order. So a counter identifies the waiting tensors.
    """

    def __init__(self, network: UNet2D, *, device: str, bf16: bool) -> None:
        assert network.depth_halo is not None
        self.network, self.device, self.bf16 = network, device, bf16
        self.lag: int = network.depth_halo
        self._kept: list[Tensor] = []
        self._number = 0
        self._valid = torch.empty(0)

    def __call__(self, chunk: Float32, first: int, depth: int) -> Float32:
        """See `DepthStream.__call__`."""
        if first == 0:
            self._kept.clear()
        self._number = 0
        slices = torch.arange(first - self.lag, first + chunk.shape[2], device=self.device)
        self._valid = ((slices >= 0) & (slices < depth)).view(-1, 1, 1, 1)
        with torch.inference_mode(), torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            x = torch.from_numpy(np.ascontiguousarray(chunk[0])).to(self.device).transpose(0, 1)
            return self._logits(x).float().transpose(0, 1)[None].cpu().numpy()

    @property
    def kept_values(self) -> int:
        """The number of values that are stored from one chunk to the next."""
        return sum(tensor.numel() for tensor in self._kept)

    def _logits(self, x: Tensor) -> Tensor:
        """(n, C, H, W) slices to (n, K, H, W) logits, like `UNet2D.forward_slices`."""
        skips, lag = [], 0
        for level, block in enumerate(self.network.encoder):
            if level:
                x = pool(x)
            x, lag = self._block(block, x, lag)
            skips.append((x, lag))
        skips.pop()
        for block in self.network.decoder:
            skip, before = skips.pop()
            x, lag = self._block(block, join(self._late(skip, lag - before), x), lag)
        return self.network.head(x)

    def _block(self, block: nn.Module, x: Tensor, lag: int) -> tuple[Tensor, int]:
        """A block's output, and its lag in slices."""
        assert isinstance(block, Block)
        x = block.first(x)
        if block.shift is None:
            return block.second(x), lag
        return block.second(self._through(block.shift, x, lag)), lag + 1

    def _through(self, shift: DepthModule, x: Tensor, lag: int) -> Tensor:
        """The output of a depth shift module for x, one slice late."""
        if isinstance(shift, ResidualDepthShift):
            shifted = self._shifted(x, shift.each_way, lag)
            return self._late(x, 1) + shifted if shift.add else shifted
        if isinstance(shift, GatedDepthShift):
            each_way = 2 * shift.each_way
            kept, last = x.split((x.shape[1] - each_way, each_way), dim=1)
            change, last = self._shifted(last, shift.each_way, lag), self._late(last, 1)
            if not shift.add:
                change = change - last
            return torch.cat((self._late(kept, 1), last + shift.gate.to(x.dtype)[:, None, None] * change), dim=1)
        distil = shift.distil if isinstance(shift, AddedDistillDepthShift) else shift
        if not isinstance(distil, DistillDepthShift):
            raise TypeError(f"{type(shift).__name__} cannot be streamed")
        if distil.convolution is None:
            return self._late(x, 1)
        unchanged, last = x.split((distil.unchanged, distil.distilled), dim=1)
        shifted = self._shifted(distil.convolution(last), distil.each_way, lag)
        if distil is not shift:
            shifted = self._late(last, 1) + shifted
        return torch.cat((self._late(unchanged, 1), shifted), dim=1)

    def _shifted(self, x: Tensor, each_way: int, lag: int) -> Tensor:
        """`depth_shift` of x, one slice late. x has the lag `lag` and is zero outside the volume."""
        start = self.lag - lag
        x = torch.where(self._valid[start : start + len(x)], x, 0)
        line = self._line(x, 2)
        stay = x.shape[1] - 2 * each_way
        parts = (line[1:-1, :stay], line[2:, stay : stay + each_way], line[:-2, stay + each_way :])
        return torch.cat(parts, dim=1)

    def _late(self, x: Tensor, slices: int) -> Tensor:
        return self._line(x, slices)[: len(x)] if slices else x

    def _line(self, x: Tensor, slices: int) -> Tensor:
        """Put the last `slices` slices of the earlier calls in front of x; zeros in the first call."""
        if self._number == len(self._kept):
            self._kept.append(x.new_zeros((slices, *x.shape[1:])))
        line = torch.cat((self._kept[self._number], x))
        self._kept[self._number] = line[len(x) :].clone()
        self._number += 1
        return line
