"""Makes the pictures of the documentation: `python docs/pictures.py [depth_shift] ...`, by default all.

`depth_shift` is computed by the package's own shift and network. The screenshots (`screens`) are of a finished
`make demo` in the current directory and need Chromium and Playwright.
"""

from __future__ import annotations

import argparse
from pathlib import Path

IMAGES = Path(__file__).parent / "img"


def depth_shift_picture() -> None:
    """Which slice each feature comes from after a shift, and how far one voxel reaches through the whole network."""
    import matplotlib as mpl
    import numpy as np
    import torch

    from distilldsm.evaluation.figures import COLOURS
    from distilldsm.models.depth_shift import depth_shift
    from distilldsm.models.registry import build_model

    mpl.use("agg")
    from matplotlib import pyplot as plt

    depth, channels = 6, 16
    origin = torch.arange(1.0, depth + 1).view(depth, 1, 1, 1).expand(depth, channels, 1, 1).contiguous()
    # The distilled features of alpha 1/2: a quarter of them goes to each neighbour, half of them stays.
    shifted = torch.cat((origin[:, :8], depth_shift(origin[:, 8:].contiguous(), depth, 2, 2)), dim=1)

    figure, (before, after, reach) = plt.subplots(
        1, 3, figsize=(12, 3.6), width_ratios=(1, 1, 1.1), layout="constrained"
    )
    colours = mpl.colors.ListedColormap(["#FFFFFF", *COLOURS[:depth]])
    for axis, features, title in ((before, origin, "features of six slices"), (after, shifted, "after the shift")):
        cells = features[:, :, 0, 0].numpy()
        axis.imshow(cells, cmap=colours, vmin=0, vmax=depth, aspect="auto")
        for (row, column), value in np.ndenumerate(cells):
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="black")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("channel")
        axis.set_xticks([3.5, 9.5, 12.5, 14.5], ["unchanged", "R", "B", "F"])
        axis.set_yticks(range(depth), [str(n + 1) for n in range(depth)])
        axis.set_ylabel("slice")
        axis.set_xticks(np.arange(-0.5, channels), minor=True)
        axis.set_yticks(np.arange(-0.5, depth), minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="both", length=0)

    slices, middle = 25, 12
    for name, colour, width in (("unet2d", COLOURS[1], 0.8), ("distill_dsm", COLOURS[0], 0.4)):
        torch.manual_seed(0)
        network = build_model(name, in_channels=1, out_channels=2).eval()
        x = torch.randn(1, 1, slices, 64, 64, requires_grad=True)
        network(x)[0, :, middle, 32, 32].sum().backward()
        assert x.grad is not None
        share = x.grad[0, 0].abs().sum(dim=(1, 2)).double()
        share = (share / share.sum()).numpy()
        shown = np.where(share > 0, share, np.nan)
        reach.bar(np.arange(slices) - middle, shown, width=width, color=colour, label=name)
    reach.set_yscale("log")
    reach.set_xticks(range(-8, 9, 2))
    reach.set_xlim(-10, 10)
    reach.set_xlabel("slices away")
    reach.set_ylabel("share of the gradient")
    reach.set_title("what one voxel's output depends on", fontsize=11)
    reach.grid(alpha=0.3, axis="y")
    reach.legend(frameon=False, fontsize=9)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "depth_shift.png", dpi=100, metadata={"Software": None})
    plt.close(figure)


PICTURES = {"depth_shift": depth_shift_picture}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}")
    for name in parser.parse_args().names or PICTURES:
        PICTURES[name]()


if __name__ == "__main__":
    main()
