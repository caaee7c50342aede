"""The catalogue against the table MONAI ships."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from distilldsm.core.errors import ConfigError
from distilldsm.data.catalog import CATALOG, lookup


def monai_table() -> dict[str, dict[str, str]]:
    """The class attributes of MONAI's DecathlonDataset, read from its source (its import takes ten seconds)."""
    spec = importlib.util.find_spec("monai")
    if spec is None or spec.origin is None:
        pytest.skip("monai is not installed")
    tree = ast.parse((Path(spec.origin).parent / "apps" / "datasets.py").read_text())
    decathlon = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DecathlonDataset")
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in decathlon.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    }


def test_addresses_and_checksums_are_those_of_monai():
    table = monai_table()
    assert {f"msd:{k}": v for k, v in table["md5"].items()} == {k: e.md5 for k, e in CATALOG.items()}
    assert {f"msd:{k}": v for k, v in table["resource"].items()} == {k: e.urls[0] for k, e in CATALOG.items()}


def test_every_entry_has_mirrors_licence_and_channels():
    assert len(CATALOG) == 10
    for name, entry in CATALOG.items():
        task = name.removeprefix("msd:")
        assert len(set(entry.urls)) == len(entry.urls) >= 2
        assert all(url.startswith("https://") and url.endswith(f"/{task}.tar") for url in entry.urls)
        assert entry.licence == "CC-BY-SA 4.0"
        assert set(entry.channels.values()) <= {"MRI", "CT"}
        assert entry.cases >= 20
    assert len({entry.md5 for entry in CATALOG.values()}) == 10


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("msd:Hippocampus", "msd:Task04_Hippocampus"),
        ("msd:task04_hippocampus", "msd:Task04_Hippocampus"),
        ("msd:Task02_Hart", "msd:Task02_Heart"),
    ],
)
def test_an_unknown_task_is_answered_with_the_nearest(wrong, right):
    with pytest.raises(ConfigError, match=f"did you mean '{right}'") as caught:
        lookup(wrong)
    assert caught.value.exit_code == 2
    assert lookup(right).md5
