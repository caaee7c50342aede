"""`distilldsm compose`: what it takes, what it refuses and how it tells, what it writes."""

from __future__ import annotations

import errno
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from distilldsm.cli.main import main
from distilldsm.config import load_params


def compose(repository: Path, *arguments: str) -> int:
    return main(["compose", "--conf", str(repository / "conf"), *arguments])


def test_compose_writes_checked_parameters(repository, tmp_path, capsys):
    output = tmp_path / "params.yaml"
    assert compose(repository, "dataset=hippocampus", "model=unet3d", "train.epochs=5", "-o", str(output)) == 0
    params = load_params(output)
    assert (params.train.model.name, params.train.epochs) == ("unet3d", 5)
    assert params.download.source == "msd:Task04_Hippocampus"
    assert "# Written by: distilldsm compose dataset=hippocampus model=unet3d train.epochs=5" in output.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["params.yaml"]
    capsys.readouterr()
    assert compose(repository, "-o", "-") == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load((repository / "params.yaml").read_text())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=5", "train.epoch: unknown parameter 'epoch'"),
        ("train.epoch=5", "did you mean 'epochs'?"),
        ("dataset=lungs", "hippocampus"),
        ("train.epochs=0", "at least 1"),
        ("train.epochs=many", "a whole number"),
        ("train", "compose: is not an assignment"),
        ("surprise=1", "unknown parameter 'surprise'"),
        ("+train.epochs=1", "hint: train.epochs=1"),
        ("~train.epochs", "set without '~'"),
        ("=cluster", "is not an assignment"),
        ("download.source=${oc.env:HOME}", "no ${...}: "),
        ("dataset=custom", "conf/dataset/custom.yaml: download.source"),
        ("dataset=custom", "download.source=FOLDER"),
    ],
)
def test_compose_refuses_and_keeps_what_was_there(repository, tmp_path, capsys, override, words):
    output = tmp_path / "params.yaml"
    output.write_text("kept")
    assert compose(repository, override, "-o", str(output)) == 2
    assert words in capsys.readouterr().err
    assert output.read_text() == "kept"


def test_compose_does_not_give_the_samples_training_to_other_data_unsaid(repository, tmp_path, capsys):
    output = tmp_path / "params.yaml"
    assert compose(repository, "download.source=/data/mine", "-o", str(output)) == 0
    assert "dataset=custom" in capsys.readouterr().err
    assert compose(repository, "--keep", "dataset=custom", "download.source=/data/mine", "-o", str(output)) == 0
    kept = load_params(output)
    assert compose(repository, "dataset=custom", "download.source=/data/mine", "-o", str(output)) == 0
    assert capsys.readouterr().err == ""
    assert load_params(output) == kept
    assert (kept.train.batch_size, kept.train.samples_per_case, kept.train.epochs) == (None, None, None)


def test_compose_on_top_of_what_is_there(repository, tmp_path, capsys):
    output = tmp_path / "params.yaml"
    assert (
        compose(repository, "dataset=prostate", "download.source=/data/mine", "train.epochs=5", "-o", str(output)) == 0
    )
    before = yaml.safe_load(output.read_text())
    assert compose(repository, "--keep", "model=unet2d", "train.seed=7", "-o", str(output)) == 0
    before["train"]["model"] = {"name": "unet2d", "options": {"width": 1.0}}
    before["train"]["seed"] = 7
    assert yaml.safe_load(output.read_text()) == before
    capsys.readouterr()
    assert compose(repository, "--keep", "model=unet4d", "-o", str(output)) == 2
    assert "unet3d" in capsys.readouterr().err
    assert compose(repository, "--keep", "train.epoch=7", "-o", str(output)) == 2
    assert yaml.safe_load(output.read_text()) == before


@pytest.mark.parametrize("keep", [(), ("--keep",)], ids=["defaults", "keep"])
def test_compose_reads_values_as_params_yaml_does(repository, tmp_path, capsys, keep):
    output = tmp_path / "params.yaml"
    output.write_text((repository / "params.yaml").read_text())
    given = {
        "download.source": "~/a=b",
        "download.patient_pattern": r"(p\d+)_.*",
        "download.name": "my set",
        "download.licence": "'1'",
        "download.mirrors": "[http://x/y,z]",
        "preprocess.patch_size": "[9,80,80]",
        "preprocess.regions": "{a: [organ]}",
        "preprocess.target_spacing_mm": "null",
        "train.augment": "{mirror_axes: [depth]}",
        "train.model.options": "{width:0.5}",
        "train.learning_rate": "1e-3",
    }
    assignments = [f"{key}={value}" for key, value in given.items()]
    assert compose(repository, *keep, "dataset=custom", *assignments, "-o", str(output)) == 0
    capsys.readouterr()
    values = yaml.safe_load(output.read_text())
    assert (values["download"]["source"], values["download"]["patient_pattern"]) == ("~/a=b", r"(p\d+)_.*")
    assert [values["download"][key] for key in ("name", "licence", "mirrors")] == ["my set", "1", ["http://x/y", "z"]]
    found = values["preprocess"]
    assert (found["patch_size"], found["regions"], found["target_spacing_mm"]) == ([9, 80, 80], {"a": ["organ"]}, None)
    assert values["train"]["learning_rate"] == 0.001
    shipped = yaml.safe_load((repository / "params.yaml").read_text())["train"]
    assert values["train"]["augment"] == {**shipped["augment"], "mirror_axes": ["depth"]}
    assert values["train"]["model"]["options"] == {"width": 0.5}, "the options of one network mean nothing to another"
    again = ("preprocess.regions={b: [x]}", "train.model.options={}", "-o", str(output))
    assert compose(repository, "--keep", *again) == 0
    values = yaml.safe_load(output.read_text())
    assert (values["preprocess"]["regions"], values["train"]["model"]["options"]) == ({"b": ["x"]}, {})


MINE = """download:
  source: /data/mine
  layout: pattern
  pattern: {images: ["a/{case}.nii"], label: "b/{case}.nii", channels: {T1: MRI}, labels: {background: 0, organ: 1}}
"""


@pytest.fixture
def conf(repository, tmp_path, monkeypatch) -> Path:
    """The current directory, with presets to change and params.yaml."""
    shutil.copytree(repository / "conf", tmp_path / "conf")
    shutil.copyfile(repository / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "conf/dataset"


@pytest.mark.parametrize("keep", [(), ("--keep",)], ids=["defaults", "keep"])
def test_a_mistake_in_a_preset_is_told_with_its_file(conf, capsys, keep):
    def told(preset: str, *overrides: str) -> str:
        (conf / "mine.yaml").write_text(preset)
        assert main(["compose", *keep, "dataset=mine", *overrides]) == 2
        return capsys.readouterr().err

    others = ("model=unet3d", "train.epochs=5")
    text = told(MINE.replace("T1: MRI", "T1: MIR"), *others)
    assert text.startswith("error: conf/dataset/mine.yaml: download.pattern.channels.T1: ")
    text = told(MINE.replace('label: "b/{case}.nii", ', ""), *others)
    assert text.startswith("error: conf/dataset/mine.yaml: download.pattern: parameter 'label' is missing")
    text = told(MINE + "train: {epoch: 3}\n", *others)
    assert text.startswith("error: conf/dataset/mine.yaml: train.epoch: unknown parameter 'epoch'")
    assert "mine.yaml: a key is given twice\n  seen: download.source, lines 2 and 5" in told(MINE + "  source: b\n")
    assert told(MINE, "train.epochs=0").startswith("error: train.epochs: ")
    assert told(MINE, "train.augment.mirror_axes=[up]").startswith("error: train.augment.mirror_axes[0]: ")
    if keep:
        (conf / "../../params.yaml").write_text("train: {epochs: 0}\n")
        assert told(MINE).startswith("error: params.yaml: train.epochs: ")
    for old in ("# @package _global_\n", "\n#@package  elsewhere\n", ""):  # a line that earlier versions needed
        (conf / "mine.yaml").write_text(old + MINE)
        assert main(["compose", "dataset=mine"]) == 0
        assert load_params("params.yaml").download.source == "/data/mine"


def test_another_pattern_replaces_the_one_that_is_kept(conf):
    (conf / "mine.yaml").write_text(MINE)
    (conf / "501.yaml").write_text(MINE.replace("organ", "liver"))
    assert main(["compose", "dataset=mine"]) == 0
    assert main(["compose", "--keep", "dataset=501"]) == 0
    kept = load_params("params.yaml")
    assert dict(kept.download.pattern.labels) == {"background": 0, "liver": 1}
    assert main(["compose", "dataset=501"]) == 0
    assert load_params("params.yaml") == kept


def test_the_head_tells_every_command(conf):
    def head() -> list[str]:
        lines = [line for line in Path("params.yaml").read_text().splitlines() if line.startswith("#")]
        assert lines.pop(0) == "# yaml-language-server: $schema=conf/params.schema.json"
        return lines

    first = ["dataset=custom", "download.source=/data/my set"]
    assert main(["compose", *first]) == 0
    assert main(["compose", "--keep", "preprocess.folds=2"]) == 0
    assert main(["compose", "--keep", "preprocess.folds=2"]) == 0
    assert main(["compose", "--keep", "download.name=a\n\n b"]) == 0
    assert head() == [
        "# Written by: distilldsm compose dataset=custom 'download.source=/data/my set'",
        "# Written by: distilldsm compose --keep preprocess.folds=2",
        r"# Written by: distilldsm compose --keep 'download.name=a\x0a\x0a b'",
        "# What each parameter means: distilldsm params",
    ]
    assert load_params("params.yaml").download.name == "a\nb"
    assert shlex.split(head()[0])[3:] == ["distilldsm", "compose", *first]
    assert main(["compose"]) == 0
    assert head()[0] == "# Written by: distilldsm compose"
    assert len(head()) == 2


def test_an_output_that_cannot_be_written_is_told_by_its_name(conf, capsys, monkeypatch):
    for output, words in (
        ("nodir/a.yaml", "nodir/a.yaml: cannot be written\n  seen: No such file or directory\n  hint: make its folder"),
        ("params.yaml/a.yaml", "params.yaml/a.yaml: cannot be written\n  seen: Not a directory\n  hint: name a place"),
    ):
        assert main(["compose", "-o", output]) == 1
        assert capsys.readouterr().err.startswith(f"error: {words}")
    refused = PermissionError(13, "Permission denied", ".a.yaml.1.tmp")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(refused))
    assert main(["compose", "-o", "a.yaml"]) == 1
    assert capsys.readouterr().err.startswith("error: a.yaml: cannot be written\n  seen: Permission denied\n  hint: ")
    full = OSError(errno.ENOSPC, "No space left on device", ".a.yaml.1.tmp")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(full))
    assert main(["compose", "-o", "a.yaml"]) == 1
    assert capsys.readouterr().err == (
        "error: a.yaml: No space left on device\n  hint: free space, then run the same command again\n"
    )


def test_compose_keep_needs_what_it_keeps(conf, capsys):
    assert main(["compose", "--keep", "train.epochs=2", "-o", "none.yaml"]) == 2
    assert "hint: leave --keep out" in capsys.readouterr().err


def test_compose_needs_the_presets(tmp_path, capsys):
    assert main(["compose", "--conf", str(tmp_path)]) == 2
    assert "holds no presets" in capsys.readouterr().err


COMMENTED = """# Ours: do not touch.

train:  # as agreed on Monday
  # twice the sample's
  epochs: 20      # see the wiki
  learning_rate: 1e-3 # found by the sweep
  model:
    # narrow: the laptop is small
    options:
      width: 0.5  # half
      alpha: 0.25
    # the name comes last here
    name: 'distill_dsm'
  deterministic: yes
cv: {folds: [0, 1]} # two for now
"""


def test_keep_changes_values_and_no_comment(conf):
    Path("params.yaml").write_text(COMMENTED)
    changes = ["train.epochs=5", "train.model.options={alpha: 0.5, shift_at: encoder}", "cv.folds=[2]", "train.seed=7"]
    changes += ["download.name='yes'", "train.deterministic=false"]
    assert main(["compose", "--keep", *changes]) == 0
    text = Path("params.yaml").read_text()
    comments = [line.partition("#")[2].strip() for line in COMMENTED.splitlines() if "#" in line]
    assert [comment for comment in comments if f"# {comment}\n" not in text] == ["half"], "its key is gone"
    assert "  epochs: 5 " in text
    assert "learning_rate: 1e-3 #" in text, "what does not change keeps its form"
    assert "name: 'distill_dsm'" in text
    expected = yaml.safe_load(COMMENTED)
    expected["train"] |= {"epochs": 5, "seed": 7, "deterministic": False}
    expected["train"]["model"]["options"] = {"alpha": 0.5, "shift_at": "encoder"}
    expected |= {"cv": {"folds": [2]}, "download": {"name": "yes"}}
    assert yaml.safe_load(text) == expected


def test_presets_on_the_defaults_keep_the_comments_of_the_file(conf):
    shipped = Path("params.yaml").read_text()
    mine = shipped.replace("  seed: 0  ", "  # ours\n  seed: 3  ").replace("# Passes over the", "# MY passes over the")
    Path("params.yaml").write_text(mine)
    assert main(["compose", "dataset=hippocampus"]) == 0
    text = Path("params.yaml").read_text()
    assert "  # ours\n  seed: 0  " in text
    assert "epochs: 40                      # MY passes" in text
    assert main(["compose"]) == 0
    assert yaml.safe_load(Path("params.yaml").read_text()) == yaml.safe_load(shipped)


@pytest.mark.parametrize(
    "text",
    ["train: &t {epochs: 3}\ncv: {folds: [0]}\n", "{train: {epochs: 3}}\n"],
)
def test_any_yaml_is_changed_to_the_same_values(conf, text):
    Path("params.yaml").write_text(text)
    assert main(["compose", "--keep", "train.seed=5"]) == 0
    expected = yaml.safe_load(text)
    expected["train"]["seed"] = 5
    assert yaml.safe_load(Path("params.yaml").read_text()) == expected
