"""Compares the speed with nnU-Net and MONAI: the same volumes, on the CPU, all networks with random weights.

    python -m benchmarks.peers nnunet --data PATH/Task04_Hippocampus.tar    # needs: pip install nnunetv2
    python -m benchmarks.peers monai

`nnunet`: nnU-Net plans the data set. First its network and ours run in OpenVINO (float32) on one whole volume; then
`nnUNetv2_predict` (default settings, one fold) and `distilldsm predict` run from file to file, on one scan and on ten.
`monai`: MONAI's UNet and sliding-window inferer in PyTorch, and our network in OpenVINO, both float32. First without
files, then from file to file (MONAI's transforms read, reorient, normalise and save). Both print JSON. Runs are
interleaved; ratios compare medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.latency import compiled, interleaved
from benchmarks.pipeline import ROOT, machine
from benchmarks.predict import make_model, small_plan

TASK = 4
WINDOW = (96, 96, 96)
"""MONAI's usual patch."""


def padded(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The shape, rounded up to multiples of the stride."""
    return tuple(-(-n // s) * s for n, s in zip(shape, stride, strict=True))


def nnunet(data: Path, work: Path, repeats: int) -> dict[str, Any]:
    """Compare with nnU-Net's network for the hippocampus and with its command."""
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(work / name)
    plans, folder = planned(data, work)
    scans = sorted((work / "raw" / folder / "imagesTr").glob("*.nii.gz"))
    network = nnunet_network(plans)
    ours = work / "ours"
    if not ours.exists():
        make_model(ours, small_plan())

    import nibabel as nib

    shape = tuple(int(n) for n in nib.load(scans[0]).shape[::-1])
    stride = [int(np.prod(s)) for s in zip(*plans["architecture"]["arch_kwargs"]["strides"], strict=True)]
    to_onnx(network, work / "nnunet.onnx", padded(shape, stride))
    runs = {
        "nnunet": compiled(work / "nnunet.onnx", (1, 1, *padded(shape, stride)), "f32"),
        "distill_dsm": compiled(ours / "model.xml", (1, 1, *padded(shape, (1, 16, 16))), "f32"),
    }
    network_seconds = interleaved(runs, repeats)
    results: dict[str, Any] = {
        "machine": machine(),
        "volume": list(shape),
        "nnunet_parameters": sum(p.numel() for p in network.parameters()),
        "network_seconds": {name: round(v, 4) for name, v in network_seconds.items()},
        "network_ratio": round(network_seconds["nnunet"] / network_seconds["distill_dsm"], 1),
    }
    save_checkpoint(network, work, folder)
    for count in (1, 10):
        inputs = work / f"in{count}"
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir()
        for scan in scans[:count]:
            shutil.copy(scan, inputs)
        script = Path(sys.executable).with_name("nnUNetv2_predict")
        theirs = [script, "-i", inputs, "-d", TASK, "-c", "3d_fullres", "-f", 0, "-device", "cpu", "-o"]
        own = [sys.executable, "-m", "distilldsm", "predict", ours, inputs, "-o"]
        commands = {"nnunet": theirs, "distilldsm": own}
        seconds = interleaved({name: command(line, work / "out" / name) for name, line in commands.items()}, 3)
        results[f"files_{count}"] = {
            "seconds": {name: round(v, 2) for name, v in seconds.items()},
            "ratio": round(seconds["nnunet"] / seconds["distilldsm"], 1),
        }
    return results


def planned(data: Path, work: Path) -> tuple[dict[str, Any], str]:
    """nnU-Net's own 3d_fullres configuration for the data set, and the data set's folder name."""
    from nnunetv2.dataset_conversion.convert_MSD_dataset import convert_msd_dataset
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments

    if not list((work / "raw").glob("Dataset*")):
        with tarfile.open(data) as archive:
            archive.extractall(work / "msd", filter="data")
        for extra in (work / "msd").rglob("._*"):
            extra.unlink()
        (task,) = (p.parent for p in (work / "msd").rglob("dataset.json"))
        (task / "imagesTs").mkdir(exist_ok=True)
        convert_msd_dataset(str(task), TASK, 2)
    (folder,) = (p.name for p in (work / "raw").glob("Dataset*"))
    path = work / "preprocessed" / folder / "nnUNetPlans.json"
    if not path.exists():
        extract_fingerprints([TASK], num_processes=2, verbose=False, show_progress_bar=False)
        plan_experiments([TASK])
    plans = json.loads(path.read_text())
    return plans["configurations"]["3d_fullres"], folder


def nnunet_network(plans: dict[str, Any]) -> Any:
    """The planned network for one channel and three classes, in prediction mode."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    torch.manual_seed(0)
    architecture = plans["architecture"]
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        3,
        deep_supervision=False,
    ).eval()


def to_onnx(network: Any, path: Path, shape: Sequence[int]) -> None:
    """Export a PyTorch network to ONNX for one input shape."""
    import torch

    torch.onnx.export(network, (torch.zeros(1, 1, *shape),), path, dynamo=True, verbose=False, external_data=False)


def save_checkpoint(network: Any, work: Path, folder: str) -> None:
    """Write the files of an nnU-Net training that nnU-Net's prediction reads."""
    import torch

    target = work / "results" / folder / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (target / "fold_0").mkdir(parents=True, exist_ok=True)
    for source, name in (
        (work / "raw" / folder / "dataset.json", "dataset.json"),
        (work / "preprocessed" / folder / "nnUNetPlans.json", "plans.json"),
        (work / "preprocessed" / folder / "dataset_fingerprint.json", "dataset_fingerprint.json"),
    ):
        shutil.copy(source, target / name)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, target / "fold_0" / "checkpoint_final.pth")


def command(line: Sequence[Any], output: Path) -> Any:
    """A function that empties the directory `output` and runs a command that writes to it."""

    def run() -> None:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([str(part) for part in [*line, output]], capture_output=True, text=True, env=environment)
        if done.returncode or not list(output.glob("*.nii.gz")):
            raise SystemExit(f"{line[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")

    return run


def monai_network() -> tuple[Any, Any]:
    """MONAI's UNet (16 to 256 channels, two residual units) and its sliding-window inferer."""
    import torch
    from monai.inferers import SlidingWindowInferer
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    network = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=3,
        channels=(16, 32, 64, 128, 256),
        strides=(2, 2, 2, 2),
        num_res_units=2,
        norm="batch",
    ).eval()
    return network, SlidingWindowInferer(roi_size=WINDOW, sw_batch_size=1, overlap=0.5)


def monai(work: Path, shapes: Sequence[Sequence[int]], repeats: int) -> dict[str, Any]:
    """Compare with MONAI's network and inferer, without files and from file to file."""
    import nibabel as nib
    import torch

    network, inferer = monai_network()
    ours = work / "ours"
    if not ours.exists():
        make_model(ours, small_plan())
    results: dict[str, Any] = {"machine": machine(), "window": list(WINDOW), "overlap": 0.5}
    for shape in shapes:
        title = "x".join(map(str, shape))
        image = torch.zeros(1, 1, *shape)

        def theirs(image: Any = image) -> None:
            with torch.inference_mode():
                inferer(image, network)

        mine = compiled(ours / "model.xml", (1, 1, *padded(shape, (1, 16, 16))), "f32")
        network_seconds = interleaved({"monai": theirs, "distill_dsm": mine}, repeats)
        inputs = work / f"made-{title}"
        inputs.mkdir(exist_ok=True)
        voxels = np.random.default_rng(0).integers(0, 300, shape[::-1]).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), inputs / "scan.nii.gz")
        lines = {
            "monai": [sys.executable, "-m", "benchmarks.peers", "monai-files", "--inputs", inputs, "--output"],
            "distilldsm": [sys.executable, "-m", "distilldsm", "predict", ours, inputs, "-o"],
        }
        files = interleaved({name: command(line, work / "out" / name) for name, line in lines.items()}, 3)
        results[title] = {
            "network_seconds": {name: round(v, 4) for name, v in network_seconds.items()},
            "network_ratio": round(network_seconds["monai"] / network_seconds["distill_dsm"], 1),
            "file_seconds": {name: round(v, 2) for name, v in files.items()},
            "file_ratio": round(files["monai"] / files["distilldsm"], 1),
        }
    return results


def monai_files(inputs: Path, output: Path) -> None:
    """Segment scans as a typical MONAI script does."""
    import torch
    from monai.transforms import Compose, LoadImage, NormalizeIntensity, Orientation, SaveImage

    network, inferer = monai_network()
    read = Compose([LoadImage(ensure_channel_first=True), Orientation("RAS"), NormalizeIntensity(nonzero=True)])
    save = SaveImage(output_dir=output, output_postfix="", separate_folder=False, print_log=False)
    with torch.inference_mode():
        for path in sorted(inputs.glob("*.nii.gz")):
            image = read(path)
            logits = inferer(image[None], network)[0]
            save(logits.argmax(dim=0, keepdim=True), meta_data=image.meta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("nnunet", "monai", "monai-files"))
    parser.add_argument("--data", type=Path, help="Task04_Hippocampus.tar of the Medical Segmentation Decathlon")
    parser.add_argument("--inputs", type=Path, help="only for monai-files, which monai starts")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmark-peers")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.what == "monai-files":
        monai_files(args.inputs, args.output)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if args.what == "monai":
        results = monai(args.work, ((36, 50, 35), (96, 128, 128)), args.repeats)
    elif args.data is None:
        parser.error("nnunet needs --data")
    else:
        results = nnunet(args.data.resolve(), args.work.resolve(), args.repeats)
    results["benchmark_seconds"] = round(time.perf_counter() - started)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
