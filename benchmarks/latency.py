"""Measures the speed of the networks relative to the plain 2-D U-Net of the same widths, all in one run.

    python -m benchmarks.latency                 # everything
    python -m benchmarks.latency --only torch    # training steps only; on a GPU where there is one
    python -m benchmarks.latency --json

The networks have random weights, one modality and three classes. `openvino` measures whole volumes in float32, at
OpenVINO's default precision (`auto`: bf16 if the CPU supports it) and in INT8. `torch` measures training steps
(forward, backward, AdamW) in channels-last. Runs are interleaved; ratios compare medians. `peak` is the speed of a
chain of dense 3x3 convolutions with 128 channels; the output gives each network's share of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.pipeline import machine
from distilldsm.models import build_model
from distilldsm.models.base import SegmentationNetwork

CLASSES = 3
PRECISIONS = ("f32", "auto", "int8")
BASE = "unet2d"
NETWORKS = ("unet2d", "residual_dsm", "distill_dsm", "unet3d_same_width", "unet3d")
Median = dict[str, float]


class SameWidthUNet3D(SegmentationNetwork):
    """The paper's 2-D U-Net with 3x3x3 convolutions. Pooling and upsampling include the depth axis."""

    stride = (16, 16, 16)
    depth_halo = None

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128, 128)) -> None:
        super().__init__(1, CLASSES)

        def block(inputs: int, middle: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i, o in ((inputs, middle), (middle, outputs)):
                layers += [nn.Conv3d(i, o, 3, padding=1), nn.BatchNorm3d(o), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.encoder = nn.ModuleList(block(i, o, o) for i, o in zip((1, *widths[:-1]), widths, strict=True))
        self.decoder = nn.ModuleList()
        below = widths[-1]
        for level in range(len(widths) - 2, -1, -1):
            joined, out = widths[level] + below, widths[max(level - 1, 0)]
            self.decoder.append(block(joined, joined // 2, out))
            below = out
        self.head = nn.Conv3d(below, CLASSES, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)
            x = block(torch.cat((skips.pop(), x), dim=1))
        return self.head(x)


def network(name: str) -> SegmentationNetwork:
    """A network with random weights, the same at every call."""
    torch.manual_seed(0)
    if name == "unet3d_same_width":
        return SameWidthUNet3D()
    return build_model(name, in_channels=1, out_channels=CLASSES)


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> Median:
    """Median seconds of each run. Every round runs all of them in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if k:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compiled(path: Path, shape: Sequence[int], precision: str) -> Callable[[], object]:
    """Compile an OpenVINO model for one input shape. Returns a function that runs it."""
    from distilldsm.inference.engines import openvino_core

    core = openvino_core()
    model = core.read_model(os.fspath(path))
    model.reshape(list(shape))
    properties = {"INFERENCE_PRECISION_HINT": "f32"} if precision == "f32" else {}
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return lambda: request.infer([image], share_inputs=True)


def quantise(source: Path, target: Path) -> None:
    """Write an INT8 IR that is calibrated on noise: only its speed is meaningful."""
    import openvino

    from distilldsm.export.int8 import _quiet
    from distilldsm.inference.engines import openvino_core

    os.environ.setdefault("NNCF_CI", "1")
    with _quiet():
        import nncf

        noise = np.random.default_rng(0).normal(size=(2, 1, 1, 16, 64, 64)).astype(np.float32)
        quantised = nncf.quantize(
            openvino_core().read_model(os.fspath(source)), nncf.Dataset(list(noise)), subset_size=2
        )
    openvino.save_model(quantised, os.fspath(target))


def openvino_seconds(shape: Sequence[int], repeats: int) -> dict[str, Any]:
    """Measure whole volumes for every network and precision, and the machine's convolution speed."""
    from distilldsm.export.onnx_export import export_onnx
    from distilldsm.export.openvino_export import export_openvino

    size = (1, 1, *shape)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        macs = {}
        for name in NETWORKS:
            built = network(name)
            macs[name] = built.cost().macs_per_voxel * float(np.prod(shape))
            export_onnx(built, root / f"{name}.onnx")
            export_openvino(root / f"{name}.onnx", root / f"{name}.xml", fp16=True)
            if name in (BASE, "distill_dsm"):
                quantise(root / f"{name}.xml", root / f"{name}_int8.xml")
        runs = {
            f"{name} {precision}": compiled(path, size, precision)
            for name in NETWORKS
            for precision in PRECISIONS
            if (path := root / (f"{name}_int8.xml" if precision == "int8" else f"{name}.xml")).exists()
        }
        medians = interleaved(runs, repeats)
        peaks = convolution_peak(root, repeats)
    results: dict[str, Any] = {"volume": list(shape)}
    for precision in PRECISIONS:
        own = {n: medians[f"{n} {precision}"] for n in NETWORKS if f"{n} {precision}" in medians}
        results[precision] = ratios(own) | {
            "seconds": {n: round(v, 4) for n, v in own.items()},
            "share_of_peak": {n: round(macs[n] / v / peaks[precision], 3) for n, v in own.items()},
            "peak_gmacs_per_second": round(peaks[precision] / 1e9, 1),
        }
    exact = results["f32"]["seconds"]["distill_dsm"]
    results["speedup_over_f32"] = {p: round(exact / results[p]["seconds"]["distill_dsm"], 2) for p in ("auto", "int8")}
    # The ratios at OpenVINO's default precision.
    results |= {key: value for key, value in results["auto"].items() if key.startswith("distill_dsm_vs")}
    return results


def convolution_peak(root: Path, repeats: int) -> dict[str, float]:
    """Multiply-accumulates per second of dense 3x3 convolutions, by precision."""
    from distilldsm.export.openvino_export import export_openvino

    channels, layers, shape = 128, 8, (16, 128, 48, 48)
    torch.manual_seed(0)
    chain = nn.Sequential(
        *(m for _ in range(layers) for m in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()))
    ).eval()
    torch.onnx.export(chain, (torch.zeros(shape),), root / "chain.onnx", dynamo=True, verbose=False)
    export_openvino(root / "chain.onnx", root / "chain.xml", fp16=True)
    import nncf
    import openvino

    from distilldsm.export.int8 import _quiet
    from distilldsm.inference.engines import openvino_core

    with _quiet():
        noise = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
        model = openvino_core().read_model(os.fspath(root / "chain.xml"))
        openvino.save_model(nncf.quantize(model, nncf.Dataset(list(noise)), subset_size=1), root / "chain_int8.xml")
    runs = {p: compiled(root / ("chain_int8.xml" if p == "int8" else "chain.xml"), shape, p) for p in PRECISIONS}
    macs = layers * 9 * channels**2 * shape[0] * shape[2] * shape[3]
    return {p: macs / seconds for p, seconds in interleaved(runs, repeats).items()}


def torch_seconds(shape: Sequence[int], repeats: int, batch: int = 2) -> dict[str, Any]:
    """Measure training steps in bf16 and float32, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = torch.randn(batch, 1, *shape, device=device)
    truth = torch.randint(0, CLASSES, (batch, *shape), device=device)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    results["volumes"] = [batch, *shape]

    def step(name: str, bf16: bool) -> Callable[[], object]:
        built = network(name).to(device).train()
        for parameter in built.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(built.parameters(), lr=1e-4)

        def run() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                logits = built(image)
            F.cross_entropy(logits.float(), truth).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    for precision in ("bf16", "f32"):
        own = interleaved({name: step(name, precision == "bf16") for name in NETWORKS}, repeats)
        results[precision] = ratios(own) | {"seconds": {n: round(v, 4) for n, v in own.items()}}
    results |= {key: value for key, value in results["bf16"].items() if key.startswith("distill_dsm_vs")}
    return results


def ratios(seconds: Median) -> dict[str, float]:
    """Distill DSM's time divided by the time of each other network."""
    own = seconds["distill_dsm"]
    return {f"distill_dsm_vs_{name}": round(own / v, 3) for name, v in seconds.items() if name != "distill_dsm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("openvino", "torch"))
    parser.add_argument("--volume", type=int, nargs=3, default=(96, 128, 128), help="for openvino: depth height width")
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 64, 64), help="for torch: depth height width")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    if args.only != "torch":
        results["openvino"] = openvino_seconds(args.volume, args.repeats)
    if args.only != "openvino":
        results["torch"] = torch_seconds(args.patch, args.repeats)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(results["machine"])
    for runtime in ("openvino", "torch"):
        for precision, row in results.get(runtime, {}).items():
            if isinstance(row, dict) and "seconds" in row:
                base = row["seconds"][BASE]
                cells = [f"{n} {1000 * s:.0f} ms ({s / base:.2f})" for n, s in row["seconds"].items()]
                print(f"{runtime} {precision}: {', '.join(cells)}")
    if "openvino" in results:
        print("distill_dsm, speed over float32:", results["openvino"]["speedup_over_f32"])
        print("share of the convolution peak:", {p: results["openvino"][p]["share_of_peak"] for p in PRECISIONS})


if __name__ == "__main__":
    main()
