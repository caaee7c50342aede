"""Small 2-D networks, each with one thing that other people's have."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distilldsm.models.unet2d import UNet2D


class Small(nn.Module):
    """Three convolutions, the last two of which can have a module; in-place ReLUs in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = torch.relu_(self.stem(x))
        x = torch.relu_(self.first(x))
        return self.head(torch.relu_(self.second(x)))


class TwoLevels(nn.Module):
    """A U-Net of two levels and stride 4, with a transposed convolution and names of its own for the channels."""

    def __init__(self, inputs: int, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), _conv(2 * width))
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=4)
        self.join = nn.Sequential(_conv(2 * width), nn.ReLU(), _conv(2 * width))
        self.head = nn.Conv2d(2 * width, classes, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.down(nn.functional.max_pool2d(x, 4)))
        return self.head(torch.relu(self.join(torch.cat((x, self.up(y)), dim=1))))


def _conv(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


class Recurrent(nn.Module):
    """Goes through the same block more than once."""

    def __init__(self, inputs: int, classes: int, times: int = 3) -> None:
        super().__init__()
        self.times = times
        self.stem = nn.Conv2d(inputs, 8, 3, padding=1)
        self.block = nn.Sequential(_conv(8), nn.ReLU(), _conv(8))
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for _ in range(self.times):
            x = torch.relu(x + self.block(x))
        return self.head(x)


OWN = {"builder": "tests.models.small:TwoLevels", "in_argument": "inputs", "out_argument": "classes", "stride": 4}
"""Options of `inserted` for it."""
NEEDED = {"inserted": OWN}
"""Options without which a network of the registry cannot be built."""


class Slices(nn.Module):
    """The paper's U-Net without its modules, for slices."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2D(4, 3)

    def forward(self, x):
        return self.unet.forward_slices(x, 1)


class Checkpointed(Small):
    """Runs its middle once more in the backward pass."""

    def __init__(self, *, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        def middle(x):
            return torch.relu_(self.second(torch.relu_(self.first(x))))

        x = torch.relu_(self.stem(x))
        x = middle(x) if self.reentrant is None else checkpoint(middle, x, use_reentrant=self.reentrant)
        return self.head(x)


class Heads(NamedTuple):
    mask: torch.Tensor
    score: torch.Tensor


class Many(nn.Module):
    """Gives what networks give: nested containers, something that is no tensor, a number a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Small()

    def forward(self, x):
        y = self.body(x)
        return {"out": y, "heads": Heads(y, y.mean(dim=(1, 2, 3))), "pair": (y.mean(dim=(2, 3)), None)}
