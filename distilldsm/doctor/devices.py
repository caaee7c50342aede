"""What OpenVINO and PyTorch report about CPU and GPU. Each runs in its own process: native code may hang or crash."""

from __future__ import annotations

from typing import Any

from distilldsm.doctor.checks import Finding, clean
from distilldsm.doctor.machine import driver_version


def openvino_finding(limit_s: float) -> list[Finding]:
    """Version, and the precision that `predict --precision auto` selects on this CPU."""
    import openvino

    from distilldsm.inference.engines import openvino_core

    core = openvino_core()
    capabilities = sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    precision = str(core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string())
    version = openvino.__version__.partition("-")[0]
    seen = f"{version}; CPU: {', '.join(capabilities)}; --precision auto selects {precision}; the default is f32"
    return [Finding(name="openvino", status="ok", seen=clean(seen))]


def gpu_finding(limit_s: float) -> list[Finding]:
    """Name and memory of each GPU, and the result of a test computation."""
    import torch

    driver = driver_version()
    build = f"PyTorch {torch.__version__}" + (f", driver {driver}" if driver else "")
    if not torch.cuda.is_available():
        if not (torch.version.cuda or torch.version.hip):
            seen = f"a GPU is present, but {build} is the build for CPUs"
            hint = "install PyTorch's build for your GPU, see its installation page; or train on the CPU"
        else:
            seen = f"a GPU is present, but {build} (CUDA {torch.version.cuda}) cannot use it"
            hint = "update the driver; in a container, start it with --gpus all; is CUDA_VISIBLE_DEVICES empty?"
        return [Finding(name="gpu", status="warn", seen=seen, hint=hint)]
    return [_gpu(torch, number, build) for number in range(torch.cuda.device_count())]


def _gpu(torch: Any, number: int, build: str) -> Finding:
    facts = torch.cuda.get_device_properties(number)
    seen = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB; {build}"
    try:
        numbers = torch.arange(4096, device=f"cuda:{number}", dtype=torch.float32).reshape(64, 64)
        trace = float((numbers @ numbers.T).trace())
        free, _ = torch.cuda.mem_get_info(number)
    except RuntimeError as error:
        hint = "does another process use all of its memory (nvidia-smi)? does this PyTorch build support the GPU?"
        return Finding(name="gpu", status="fail", seen=clean(f"{seen}; a computation fails: {error}"), hint=hint)
    expected = sum(k * k for k in range(4096))
    if abs(trace / expected - 1) > 1e-3:
        seen += f"; a computation is wrong: {trace:.6g} instead of {expected:.6g}"
        return Finding(name="gpu", status="fail", seen=seen, hint="check the GPU's health: nvidia-smi -q")
    return Finding(name="gpu", status="ok", seen=f"{seen}; a computation is correct, {free / 1e9:.0f} GB free")
