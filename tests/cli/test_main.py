"""The command line as a shell sees it: exit codes, streams, files; and what it must not import."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import COMMANDS, main
from distilldsm.components import cross_validate
from distilldsm.components.registry import STAGES
from distilldsm.config import CrossValidationConfig
from distilldsm.config.networks import MODELS
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.core.files import write_json
from distilldsm.core.shell import run_shell
from distilldsm.core.version import __version__
from distilldsm.evaluation import tables
from tests.evaluation.folds import write_folds
from tests.export.fake import Exported, exported

SLOW = ("numpy", "yaml", "nibabel", "openvino", "hashlib", "distilldsm.core.mapping")
"""Milliseconds each: more than `--help` may take."""
HEAVY = ("torch", "onnx", "mlflow", "pandas", "ruamel", "hydra", "great_expectations", "matplotlib", "dvc")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory)


def in_a_shell(code: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom distilldsm.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        f"print([m for m in {(*HEAVY, *SLOW)!r} if m in sys.modules])"
    )
    done = in_a_shell(code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    for command in (*(stage.name for stage in STAGES), *COMMANDS):
        assert command in done.stdout


def test_stages_get_their_arguments_and_give_their_exit_code(tmp_path, capsys):
    (tmp_path / "params.yaml").write_text("train: {epoch: 5}\n")
    assert main(["train", "--params", str(tmp_path / "params.yaml")]) == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err
    (tmp_path / "params.yaml").write_text("")
    arguments = ["--params", str(tmp_path / "params.yaml"), "--model", str(tmp_path / "gone")]
    assert main(["export", *arguments, "--output", str(tmp_path / "out")]) == 1
    assert "is missing" in capsys.readouterr().err


def test_usage(capsys):
    for arguments in ([], ["segment"], ["predict"], ["predict", "model", "scan.nii"], ["info", "--nonsense"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"distilldsm {__version__}"


def test_python_dash_m_is_the_same_command():
    command = [sys.executable, "-m", "distilldsm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"distilldsm {__version__}\n")


def test_info_of_a_model(made, tmp_path, capsys):
    assert main(["info", str(made.export)]) == 0
    text = capsys.readouterr().out
    for words in ("research; not a medical device", "distill_dsm(width=0.5, alpha=0.5)", "1 shell, 2 core"):
        assert words in text
    assert main(["info", str(made.export), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["network"]["depth_halo"] == 8
    assert main(["info", str(tmp_path)]) == 1


def test_view_takes_the_names_of_a_model(made, tmp_path):
    page = tmp_path / "page.html"
    volume = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4))
    nib.save(volume, tmp_path / "scan.nii.gz")
    arguments = [str(tmp_path / "scan.nii.gz"), "--model", str(made.export), "-o", str(page), "--no-open"]
    assert main(["view", *arguments]) == 0
    for name in ("shell", "core"):
        assert f'"name": "{name}"' in page.read_text()


def test_info_of_the_registry_and_the_installation(capsys):
    assert main(["info", "--models"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in MODELS)
    assert main(["info", "--models", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(MODELS)
    assert main(["info"]) == 0
    assert "openvino" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["distilldsm"]


def test_plan_of_preprocessed_and_raw_data(made, tmp_path, capsys):
    assert main(["plan", str(made.preprocessed)]) == 0
    stored = capsys.readouterr().out
    assert "coarsest spacing" in stored
    assert "T1 (MRI)" in stored
    assert main(["plan", str(made.raw), "--params", str(tmp_path / "none.yaml")]) == 0
    assert "8 training cases" in capsys.readouterr().out, "of the ten, in five folds"
    (tmp_path / "params.yaml").write_text("preprocess: {folds: 2}\n")
    assert main(["plan", str(made.raw), "--params", str(tmp_path / "params.yaml")]) == 0
    assert capsys.readouterr().out == stored
    (tmp_path / "params.yaml").write_text("preprocess: {depth_axis: y}\n")
    assert main(["plan", str(made.raw), "--params", str(tmp_path / "params.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["depth_axis"] == "y"
    (tmp_path / "params.yaml").write_text(f"preprocess: {{plan: {made.preprocessed / 'plan.json'}}}\n")
    assert main(["plan", str(made.raw), "--params", str(tmp_path / "params.yaml")]) == 0
    assert capsys.readouterr().out == stored
    assert main(["plan", str(tmp_path)]) == 1
    assert "neither a plan nor a data set" in capsys.readouterr().err


def write_summary(directory: Path, dice: float) -> None:
    rows = [
        {
            "case": f"case{k}",
            "label": label,
            **dict.fromkeys(tables.METRICS, 0.5),
            "dice": dice + 0.01 * k + (0.1 if label == "core" else 0.0),
        }
        for k in (-1, 1)
        for label in ("shell", "core")
    ]
    directory.mkdir(parents=True)
    write_json(directory / "summary.json", {"fold": 0, **tables.summarise(rows, ["shell", "core"])})


def test_summary_of_one_and_several_folds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["summary"]) == 1
    assert "no evaluated fold" in capsys.readouterr().err
    write_summary(tmp_path / "evaluation/fold0", 0.70)
    assert main(["summary"]) == 0
    text = capsys.readouterr().out
    assert "0.7000" in text
    assert "over" not in text
    write_summary(tmp_path / "evaluation/fold1", 0.80)
    assert main(["summary"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-3:]] == [
        ["label", "Dice", "sd"],
        ["shell", "0.7500", "0.0707"],
        ["core", "0.8500", "0.0707"],
    ]
    (tmp_path / "params.yaml").write_text("cv: {folds: [1]}\n")  # fold 0 is left over from earlier parameters
    assert main(["summary"]) == 0
    shown = capsys.readouterr()
    assert "evaluation/fold1" in shown.out
    assert "fold0" not in shown.out
    assert "left out: evaluation/fold0" in shown.err
    (tmp_path / "params.yaml").unlink()
    assert main(["summary", "evaluation/fold1", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"evaluation/fold1"}
    write_folds(tmp_path, count=2)
    inputs = {"evaluation": tmp_path / "evaluation", "models": tmp_path / "models"}
    output = tmp_path / "cross_validation"
    for folds in ((0, 1), (0,)):
        cross_validate.run(CrossValidationConfig(folds=folds), inputs, {"cross_validation": output})
        table = capsys.readouterr().out.split("\n", 1)[1]
        assert main(["summary", "cross_validation"]) == 0
        assert capsys.readouterr().out.split("\n", 1)[1] == table, "the table that the stage printed"
        assert main(["summary"]) == 0
        assert (table in capsys.readouterr().out) == (len(folds) > 1), "of one fold its own table is enough"
    write_json(tmp_path / "evaluation/fold0/summary.json", [1])
    assert main(["summary"]) == 1


def test_the_shell_turns_errors_into_exit_codes(capsys, monkeypatch):
    def raising(error: BaseException):
        def run() -> None:
            raise error

        return run

    monkeypatch.delenv("DISTILLDSM_DEBUG", raising=False)
    assert run_shell(lambda: None) == 0
    for error, code, words in (
        (UserError("bad data", where="x.nii"), 1, "error: x.nii: bad data"),
        (ConfigError("bad key"), 2, "error: bad key"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "locked.nii"), 1, "error: locked.nii: Permission denied\n  hint: "),
        (PermissionError(13, "Permission denied", "a/.raw.lock"), 1, "error: a/raw: Permission denied"),
        (FileNotFoundError(2, "No such file", "a/.b.0123456789ab.tmp"), 1, "error: a/b: No such file\n  hint: "),
        (OSError("odd"), 1, "error: odd\n"),
        (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), 1, "pip install '.[train]'"),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), 1, f"seen: Python {sys.executable}\n  hint: "),
    ):
        assert run_shell(raising(error)) == code
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.out == ""
    with pytest.raises(ModuleNotFoundError):
        run_shell(raising(ModuleNotFoundError("x", name="distilldsm.gone")))
    with pytest.raises(ZeroDivisionError):
        run_shell(raising(ZeroDivisionError()))
    monkeypatch.setenv("DISTILLDSM_DEBUG", "1")
    with pytest.raises(PermissionError):
        run_shell(raising(PermissionError(13, "Permission denied", "locked.nii")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_whatever_a_package_makes_of_it(capsys, monkeypatch, number):
    """A package in C that is interrupted while it is imported raises an ImportError of its own."""

    def run() -> None:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_shell(run) == 130
        assert capsys.readouterr().err.startswith("interrupted\n")
        with pytest.raises(ImportError):  # the earlier interrupt is no excuse
            run_shell(lambda: importlib.import_module("no_such_package_of_ours"))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_closed_pipe_is_no_traceback(repository):
    command = f"'{sys.executable}' -m distilldsm compose -o - --conf conf | head -c 10; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=repository,
        timeout=60,
        check=False,
        env=environment,
    )
    assert "Traceback" not in done.stderr
