"""Distill DSM: volumetric segmentation with 2-D networks whose slices exchange features."""

__version__ = "0.1.0"
