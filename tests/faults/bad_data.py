"""Damages that data sets really have, planted in good cases, and what validation must say about each."""

from tests.faults import content_damages, file_damages, header_damages
from tests.faults.damages import DAMAGES, Damage, Planted, by_case, copies, index_of, needed, plant, plant_all
from tests.faults.files import digests

__all__ = [
    "DAMAGES",
    "Damage",
    "Planted",
    "by_case",
    "content_damages",
    "copies",
    "digests",
    "file_damages",
    "header_damages",
    "index_of",
    "needed",
    "plant",
    "plant_all",
]
