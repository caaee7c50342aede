"""Distill DSM: volumetric segmentation with 2-D networks whose slices exchange features."""

from distilldsm.core.version import __version__ as __version__
