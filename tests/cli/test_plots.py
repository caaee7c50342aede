"""The plots of dvc.yaml: their files and columns are those that are written, and their page needs no network."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distilldsm.cli.main import main
from distilldsm.cli.plots import page_template
from distilldsm.data.dataset import Case, DatasetIndex
from distilldsm.evaluation.scoring import write_plots

LABELS = {"background": 0, "a": 1, "b": 2}
ANCHORS = ("<DVC_METRIC_DATA>", "<DVC_METRIC_X>", "<DVC_METRIC_Y>", "<DVC_METRIC_TITLE>")


@pytest.fixture(scope="module")
def defined(repository) -> dict[str, dict]:
    stages = yaml.safe_load((repository / "dvc.yaml").read_text())["stages"]
    plots = stages["evaluate"]["do"]["plots"]
    return {Path(file).name: options for one in plots for file, options in one.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plots")
    case = Case(id="c", patient="c", images=("c.nii.gz",), label="c_seg.nii.gz")
    index = DatasetIndex(name="n", channels=(), labels=LABELS, cases=(case,))
    rows = [{"case": "c", "label": label, "dice": 0.5, "hd95_mm": 1.0, "volume_truth_ml": 2.0} for label in ("a", "b")]
    history = [
        {"epoch": 1, "train_loss": 1.0, "learning_rate": 0.1},
        {"epoch": 2, "train_loss": 0.9, "learning_rate": 0.1, "val_dice": {"a": 0.4, "b": 0.6}, "val_dice_mean": 0.5},
    ]
    write_plots(folder, rows, history, {"c": {"confusion": [[9, 1, 0], [0, 5, 5], [1, 0, 3]]}}, index)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_plot_is_written_and_every_written_file_is_a_plot(defined, written):
    assert {p.name for p in written.iterdir()} == set(defined)


def test_columns_and_templates_exist(defined, written, repository):
    from dvc_render.vega_templates import get_template

    folder = repository / ".dvc" / "plots"
    for name, options in defined.items():
        columns = rows_of(written / name)[0].keys()
        assert {options["x"], options["y"]} <= columns, name
        text = json.dumps(get_template(options["template"], str(folder)).content)
        assert all(anchor in text for anchor in ANCHORS), options["template"]
        if options["template"].endswith("by_label"):
            assert "label" in columns
    assert {p.stem for p in folder.iterdir()} <= {options["template"] for options in defined.values()}


def test_metrics_are_cached_so_that_experiments_keep_them(repository):
    """Their folders are ignored by git: with `cache: false` an experiment would lose them."""
    stages = yaml.safe_load((repository / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for metric in stage.get("do", stage).get("metrics", []):
            assert isinstance(metric, str) or all(options.get("cache", True) for options in metric.values())


def test_the_page_loads_nothing():
    page = page_template()
    head = page[: page.index("{plot_divs}")]
    assert head.count("<script") == 1
    assert " src=" not in head[: head.index("<script")]
    assert head.count("</script") == 1
    for name in ("vega 5.", "vega-lite 5.", "vega-embed 6."):
        assert name in head
    assert "{scripts}" not in page  # where DVC would put addresses


def test_all_arguments_reach_dvc(monkeypatch):
    called = []

    def dvc(command, check):
        called.extend(command[1:])
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr("subprocess.run", dvc)
    assert main(["plots", "diff", "HEAD~1", "-o", "here", "--help"]) == 1
    assert called[:5] == ["-m", "dvc", "plots", "diff", "--html-template"]
    assert called[6:] == ["HEAD~1", "-o", "here", "--help"]


@pytest.mark.parametrize("arguments", [[], ["draw"]])
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plots", *arguments])
    assert ended.value.code == 2
    assert "{show,diff}" in capsys.readouterr().err
