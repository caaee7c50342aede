"""Other people's 2-D networks, small and with random weights, for tests."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn


def _torchvision():
    """torchvision, also where its build is for GPUs and torch's is not: then its operators do not load."""
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchvision
    except ImportError:
        pytest.skip("torchvision is not installed (pip install '.[dev]')")
    return torchvision


def network(name: str) -> nn.Module:
    """A network that takes (N, 1, H, W), or (N, 3, H, W) for torchvision's, in evaluation mode."""
    torch.manual_seed(0)
    vision = _torchvision()
    if name == "torchvision resnet18":
        made = vision.models.resnet18(num_classes=4)
    elif name == "torchvision convnext":
        made = vision.models.convnext_tiny(num_classes=4)
    elif name == "timm resnet":
        # Untrained, its residual branches end in zeros unless told otherwise: no gradient would reach the modules.
        timm = pytest.importorskip("timm")
        made = timm.create_model("resnet10t", in_chans=1, features_only=True, zero_init_last=False)
    elif name == "timm convnext":
        made = pytest.importorskip("timm").create_model("convnext_atto", in_chans=1, num_classes=4)
    elif name == "smp U-Net":
        smp = pytest.importorskip("segmentation_models_pytorch")
        made = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=3)
    else:
        nets = pytest.importorskip("monai.networks.nets")
        made = nets.BasicUNet(spatial_dims=2, in_channels=1, out_channels=3, features=(8, 8, 16, 16, 16, 8))
    return made.eval()


NAMES = ("torchvision resnet18", "torchvision convnext", "timm resnet", "timm convnext", "smp U-Net", "MONAI BasicUNet")
CHANNELS = {"torchvision resnet18": 3, "torchvision convnext": 3}
