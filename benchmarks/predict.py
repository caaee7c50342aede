"""Measures memory and start-up time of `distilldsm predict` with a paper-size Distill DSM of random weights.

    python -m benchmarks.predict memory        # peak memory for synthetic CT, 512 x 512 x {200, 400, 800} voxels
    python -m benchmarks.predict cold-start    # seconds for one hippocampus-sized volume: median of 5 commands

Both print JSON. Model and volumes are created below --work (default: build/benchmark-predict) and kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.pipeline import ROOT, machine

CT_SPACING_MM = (0.78, 0.78, 1.25)
"""Spacing (x, y, z) of the synthetic CT. The plan resamples to 0.8 x 0.8 x 2.5 mm."""


def ct_plan() -> Any:
    """A plan for CT at 0.8 x 0.8 x 2.5 mm."""
    from distilldsm.data.dataset import Channel
    from distilldsm.data.plan import Normalisation, Plan

    return Plan(
        name="Benchmark CT",
        channels=(Channel(name="CT", modality="CT"),),
        normalisation=(Normalisation(scheme="ct", low=-200.0, high=300.0, mean=60.0, sd=90.0),),
        class_names=("background", "organ", "tumour"),
        class_values=(0, 1, 2),
        depth_axis="z",
        target_spacing_mm=(2.5, 0.8, 0.8),
        crop_to_nonzero=False,
        coarse_slices=True,
        patch_size=(16, 192, 192),
        batch_size=2,
        median_shape=(200, 500, 500),
        training_memory_gb=2.0,
        reasons={},
    )


def small_plan() -> Any:
    """A plan for hippocampus: spacing 1 mm, z-score per case."""
    from distilldsm.data.dataset import Channel
    from distilldsm.data.plan import Normalisation

    return replace(
        ct_plan(),
        name="Benchmark hippocampus",
        channels=(Channel(name="MRI", modality="MRI"),),
        normalisation=(Normalisation(scheme="zscore"),),
        class_names=("background", "anterior", "posterior"),
        target_spacing_mm=(1.0, 1.0, 1.0),
        coarse_slices=False,
    )


def make_model(directory: Path, plan: Any, name: str = "distill_dsm", **options: Any) -> None:
    """Write a network with random weights as an exported model directory, in the layout of the export stage."""
    import torch

    from distilldsm.core.files import sha256_file, write_json
    from distilldsm.export.onnx_export import export_onnx
    from distilldsm.export.openvino_export import export_openvino
    from distilldsm.models import build_model
    from distilldsm.models.checkpoint import save_tensors
    from distilldsm.models.package import METADATA, ChannelInfo, DataInfo, ModelMetadata, NetworkInfo, TensorInfo

    directory.mkdir(parents=True)
    torch.manual_seed(0)
    channels, classes = len(plan.channels), len(plan.class_names)
    network = build_model(name, in_channels=channels, out_channels=classes, **options).eval()
    cost = network.cost()
    export_onnx(network, directory / "model.onnx")
    export_openvino(directory / "model.onnx", directory / "model.xml", fp16=True)
    save_tensors(directory / "model.safetensors", network.state_dict(), {})
    plan.save(directory / "plan.json")

    def tensor(title: str, size: int) -> TensorInfo:
        return TensorInfo(name=title, shape=(1, size, None, None, None), multiple_of=network.stride)

    metadata = ModelMetadata(
        name="distilldsm-benchmark",
        intended_use="measurement only: random weights",
        inputs=(tensor("image", channels),),
        outputs=(tensor("logits", classes),),
        channels=tuple(ChannelInfo(name=c.name, modality=c.modality, normalisation="") for c in plan.channels),
        labels=dict(zip(plan.class_names, plan.class_values, strict=True)),
        network=NetworkInfo(
            name=name,
            options=options,
            stride=network.stride,
            depth_halo=network.depth_halo,
            parameters=cost.parameters,
            macs_per_voxel=cost.macs_per_voxel,
        ),
        openvino_weights="FP16",
        data=DataInfo(name=plan.name, licence="none", reference="none", source="made", note=""),
        fold=0,
        checkpoint="last",
        files={path.name: sha256_file(path) for path in sorted(directory.iterdir())},
        versions={},
    )
    write_json(directory / METADATA, metadata)


def write_ct(path: Path, slices: int) -> None:
    """Write a synthetic CT, 512 x 512 x `slices`, int16: an ellipse of tissue in air, with an organ and noise."""
    import nibabel as nib
    import numpy as np

    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(-1, 1, 512), np.linspace(-1, 1, 512), indexing="ij")
    body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    noise = rng.normal(0, 20, (512, 512)).astype(np.int16)
    volume = np.empty((512, 512, slices), dtype=np.int16, order="F")
    for k in range(slices):
        organ = (x - 0.3 * np.sin(k / 40)) ** 2 + (y - 0.2) ** 2 < 0.05
        plane = np.where(body, np.where(organ, 120, 40), -1000)
        volume[:, :, k] = plane + np.roll(noise, (k * 37, k * 91), (0, 1))
    nib.save(nib.Nifti1Image(volume, np.diag([*CT_SPACING_MM, 1.0])), path)


def run_command(arguments: Sequence[str]) -> tuple[float, float, str]:
    """Run `distilldsm` in a new process. Returns seconds, peak resident memory (MB) and printed text."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "distilldsm", *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"distilldsm {' '.join(arguments)} failed with exit code {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6, printed


def memory(work: Path, slices: Sequence[int], engine: str, extra: Sequence[str]) -> dict[str, Any]:
    """Measure the peak memory of the command for volumes of several depths."""
    model = work / "ct"
    if not model.exists():
        make_model(model, ct_plan())
    rows = []
    for count in slices:
        scan = work / f"ct{count}.nii"
        if not scan.exists():
            write_ct(scan, count)
        output = work / "mask.nii.gz"
        arguments = ["predict", str(model), str(scan), "-o", str(output), "--engine", engine, "--json", *extra]
        seconds, peak_mb, printed = run_command(arguments)
        report = json.loads(printed)["scans"][0]
        held = 512 * 512 * count * 3 / 1e6
        rows.append(
            {
                "shape": report["shape"],
                "peak_mb": round(peak_mb),
                "image_and_mask_mb": round(held),
                "besides_mb": round(peak_mb - held),
                "estimated_mb": report["estimated_memory_mb"],
                "pieces": report["pieces"],
                "exact": report["exact"],
                "seconds": round(seconds, 1),
                "phases": report["seconds"],
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return {"machine": machine(), "engine": engine, "options": list(extra), "volumes": rows}


def cold_start(work: Path, runs: int, engine: str) -> dict[str, Any]:
    """Measure the median seconds of the whole command for one small volume."""
    import nibabel as nib
    import numpy as np

    model, scan = work / "small", work / "hippocampus.nii.gz"
    if not model.exists():
        make_model(model, small_plan())
    if not scan.exists():
        voxels = np.random.default_rng(0).integers(0, 300, (36, 50, 35)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), scan)
    arguments = ["predict", str(model), str(scan), "-o", str(work / "mask.nii.gz"), "--engine", engine, "--json"]
    seconds = [run_command(arguments)[0] for _ in range(runs)]
    return {
        "machine": machine(),
        "engine": engine,
        "shape": [36, 50, 35],
        "median_seconds": round(statistics.median(seconds), 2),
        "seconds": [round(s, 2) for s in seconds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "cold-start"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmark-predict")
    parser.add_argument("--engine", choices=("openvino", "onnx", "torch"), default="openvino")
    parser.add_argument("--slices", type=int, nargs="+", default=[200, 400, 800])
    parser.add_argument("--runs", type=int, default=5, help="repetitions of cold-start")
    args, extra = parser.parse_known_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.what == "memory":
        result = memory(args.work, args.slices, args.engine, extra)
    else:
        result = cold_start(args.work, args.runs, args.engine)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
