"""Makes the pictures of the documentation: `python docs/pictures.py [depth_shift] [report] ...`, by default all.

`depth_shift` is computed by the package itself. The others are screenshots of what `make demo` has left in
the current directory, and need Chromium and Playwright.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent / "img"


def depth_shift_picture() -> None:
    """Which slice each feature comes from after a shift, and how far one voxel reaches through the whole network."""
    import matplotlib as mpl
    import numpy as np
    import torch

    from distilldsm.models import build_model
    from distilldsm.models.depth_shift import depth_shift
    from distilldsm.report.figures import COLOURS

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


def report_picture() -> None:
    """The top of an evaluation's page."""
    with browser_page(1160, 1320) as page:
        page.goto(Path("evaluation/fold0/report.html").resolve().as_uri())
        page.wait_for_timeout(1000)
        save(page.screenshot(), "report")


def viewer_picture() -> None:
    """The viewer in that page, after a click on a label's button."""
    with browser_page(1100, 800) as page:
        page.goto(Path("evaluation/fold0/report.html").resolve().as_uri())
        viewer = page.locator("#dsm-viewer")
        viewer.scroll_into_view_if_needed()
        page.wait_for_timeout(6000)
        save(viewer.screenshot(), "viewer")


def mlflow_picture() -> None:
    """The page of the training's run in MLflow, with its report."""
    from mlflow import MlflowClient

    store = f"sqlite:///{Path('mlflow.db').resolve()}"
    client = MlflowClient(store)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["start_time DESC"])
    run = next(run for run in runs if "test_dice_mean" in run.data.metrics)
    with mlflow_server(store) as address, browser_page(1400, 900) as page:
        page.goto(f"{address}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts")
        for folder in ("evaluation", "report.html"):
            page.get_by_text(folder, exact=True).first.click()
            page.wait_for_timeout(4000)
        # Where the files lie on the machine that made the picture is nobody's business.
        page.evaluate(
            "[...document.querySelectorAll('div')].filter(d => d.textContent.startsWith('Path:'))"
            ".forEach(d => d.style.visibility = 'hidden')"
        )
        save(page.screenshot(clip={"x": 0, "y": 0, "width": 1030, "height": 890}), "mlflow")


def plots_picture() -> None:
    """DVC's plots of the workspace."""
    subprocess.run([sys.executable, "-m", "distilldsm", "plots", "show"], check=True)
    with browser_page(1250, 830) as page:
        page.goto(Path("dvc_plots/index.html").resolve().as_uri())
        page.wait_for_timeout(4000)
        save(page.screenshot(), "dvc_plots")


@contextmanager
def browser_page(width: int, height: int) -> Iterator[Any]:
    """A page of headless Chromium that can draw WebGL without a graphics card."""
    from playwright.sync_api import sync_playwright

    drawing = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=drawing)
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()


@contextmanager
def mlflow_server(store: str) -> Iterator[str]:
    """The address of an MLflow server over `store`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log)
        try:
            for _ in range(120):
                time.sleep(1)
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    continue
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def save(png: bytes, name: str) -> None:
    """A small PNG: 128 colours are enough for a page."""
    import io

    from PIL import Image

    IMAGES.mkdir(exist_ok=True)
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)


PICTURES = {
    "depth_shift": depth_shift_picture,
    "report": report_picture,
    "viewer": viewer_picture,
    "mlflow": mlflow_picture,
    "dvc_plots": plots_picture,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}")
    for name in parser.parse_args().names or PICTURES:
        PICTURES[name]()


if __name__ == "__main__":
    main()
