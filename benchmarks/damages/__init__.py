"""Damages that data sets really have, planted in good cases, and what validation must say about each."""

from benchmarks.damages import contents, headers, whole_files
from benchmarks.damages.damage import DAMAGES, Damage, Planted, by_case, copies, index_of, needed, plant, plant_all
from benchmarks.damages.nifti import digests

__all__ = [
    "DAMAGES",
    "Damage",
    "Planted",
    "by_case",
    "contents",
    "copies",
    "digests",
    "headers",
    "index_of",
    "needed",
    "plant",
    "plant_all",
    "whole_files",
]
