"""A stage is in the command line, dvc.yaml, Kubeflow and cross-validate from its record alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import yaml

from distilldsm.cli.main import main
from distilldsm.components import registry
from distilldsm.config import load_params
from distilldsm.core.files import read_json
from distilldsm.core.output_directory import output_directory
from distilldsm.core.stage import Input, Output, Stage
from distilldsm.pipeline.all_folds import Folds
from distilldsm.pipeline.cluster import load_cluster
from distilldsm.pipeline.definition import Images, build_pipeline
from distilldsm.pipeline.dvc_file import dvc_yaml

ROOT = Path(__file__).resolve().parents[2]


def run(config, inputs, outputs, *, fold, tracking=None) -> None:
    with output_directory(outputs["count"], **COUNT.key(config, inputs, fold)) as work:
        (work / "number.json").write_text("{}")


COUNT = Stage(
    name="count",
    help="count the cases of one fold",
    section="evaluate",
    inputs=(
        Input(name="evaluation", path="evaluation/fold{fold}", files={"cases": "cases.csv"}),
        Input(name="dataset", path="data/raw"),
    ),
    outputs=(
        Output(name="count", path="counts/fold{fold}", kind="Dataset", parts=("manifest.json",)),
        Output(name="number", path="counts/fold{fold}/number.json", kind="Metrics", metric=True),
    ),
    scope="fold",
    image="train",
    run=run,
    code=("evaluation",),
)
STAGES = (*registry.STAGES, COUNT)


def test_dvc_yaml_is_what_the_records_say():
    assert (ROOT / "dvc.yaml").read_text() == dvc_yaml(), "run: python -m distilldsm.pipeline.dvc_file"


def test_no_stage_depends_on_a_part_of_an_output():
    """Else `dvc repro --pull --allow-missing` fetches that part, and the next stage finds the output incomplete."""
    stages = [one.get("do", one) for one in yaml.safe_load(dvc_yaml())["stages"].values()]
    outputs = {PurePosixPath(out) for one in stages for out in one["outs"]}
    for dependency in (PurePosixPath(path) for one in stages for path in one["deps"]):
        assert not outputs & {*dependency.parents}, dependency


def test_a_new_stage_is_in_dvc_yaml():
    assert yaml.safe_load(dvc_yaml(STAGES))["stages"]["count"] == {
        "foreach": "${cv.folds}",
        "do": {
            "desc": "count the cases of one fold",
            "cmd": f"python -m {__name__} --fold ${{item}}",
            "params": ["evaluate"],
            "deps": [
                "distilldsm/components/count.py",
                "distilldsm/evaluation",
                "evaluation/fold${item}/cases.csv",
                "data/raw",
            ],
            "outs": ["counts/fold${item}/manifest.json"],
            "metrics": ["counts/fold${item}/number.json"],
        },
    }


def test_a_new_stage_is_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "STAGES", STAGES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("")
    for place in ("evaluation/fold1", "data/raw"):
        Path(place).mkdir(parents=True)
        Path(place, "cases.csv").write_text("case\n")
    command = ["count", "--fold", "1", "--set", "evaluate.nsd_tolerance_mm=2"]
    assert main(command) == 0
    made = read_json("counts/fold1/manifest.json")
    assert (made["fold"], made["config"]["nsd_tolerance_mm"], set(made["inputs"])) == (1, 2.0, {"cases", "dataset"})
    assert main(command) == 0
    assert capsys.readouterr().out == "count: up to date\n"
    Path("evaluation/fold1/cases.csv").write_text("case\none\n")
    assert main([*command, "--evaluation", "evaluation/fold1"]) == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "stage: count the cases of one fold" in " ".join(capsys.readouterr().out.split())


def test_a_new_stage_is_a_kubeflow_step_of_each_fold():
    cluster = load_cluster(ROOT / "conf" / "cluster.yaml")
    spec = build_pipeline(load_params(ROOT / "params.yaml"), cluster, Images(), STAGES).pipeline_spec
    source = spec.deployment_spec["executors"]["exec-count"]["container"]["command"][-1]
    assert "step.run('count', config=config, tracking=tracking, fold=fold" in source
    [loop] = [c for c in spec.components.values() if {"train", "count"} <= set(c.dag.tasks)]
    task = loop.dag.tasks["count"]
    assert task.inputs.artifacts["evaluation"].task_output_artifact.producer_task == "evaluate"
    assert task.inputs.artifacts["dataset"].component_input_artifact
    assert set(spec.components["comp-count"].output_definitions.artifacts) == {"count", "number"}


def test_a_new_stage_is_run_for_each_fold_by_cross_validate(tmp_path):
    folds = Folds([], jobs=1, output=tmp_path, stages=STAGES)
    assert [stage.name for stage in folds.of_scope(2)] == ["train", "evaluate", "count"]
    options = ["--fold", "2", "--evaluation", f"{tmp_path}/evaluation/fold2", "--output", f"{tmp_path}/counts/fold2"]
    assert folds.command(COUNT, 2)[3:] == options


SHAPING = {"io", "data", "report", "validation", "models", "training", "inference", "evaluation", "export", "drift"}
"""Rooms whose code decides what a stage writes; the others read parameters, show progress, track."""


def imported(path: Path) -> set[Path]:
    """Files that a module imports, now or when it is called, and not only for its types."""
    names = set()
    todo: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        todo += ast.iter_child_nodes(node)
    places = {ROOT / name.replace(".", "/") for name in names}
    files = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
    return {file for file in files if file.is_file() and file.parent.name in SHAPING}


@pytest.mark.parametrize("stage", registry.STAGES, ids=lambda stage: stage.name)
def test_a_stage_runs_again_when_code_it_imports_changes(stage):
    seen, todo = set(), {ROOT / "distilldsm" / "components" / f"{stage.name}.py"}
    while todo:
        seen |= todo
        todo = set().union(*map(imported, todo)) - seen
    assert {file.parent.name for file in seen} - {"components"} == set(stage.code)


def test_a_component_loads_only_what_describes_it():
    heavy = ("numpy", "torch", "yaml", "kfp", "nibabel", "distilldsm.config", "distilldsm.data", "distilldsm.io")
    code = f"import sys, distilldsm.components.registry\nprint([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
