"""The reference of parameters and commands says what there is."""

import dataclasses
import runpy

import pytest
import yaml

from distilldsm.cli.main import main
from distilldsm.config import Params
from distilldsm.config.reference import as_markdown, matching, parameters
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import to_mapping


def test_every_parameter_is_told_with_its_default():
    known = {p.key: p for p in parameters()}
    assert [key for key, p in known.items() if not p.text] == []
    defaults = to_mapping(Params())
    for key, p in known.items():
        value = defaults
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) and part in value else None
        if p.default and value is not None:
            assert yaml.safe_load(p.default) == value, key
    sections = {field.name for field in dataclasses.fields(Params)}
    assert {key.partition(".")[0] for key in known} == sections


def test_every_key_of_the_parameter_file_is_there(repository):
    held = yaml.safe_load((repository / "params.yaml").read_text(encoding="utf-8"))
    known = {p.key for p in parameters()}

    def keys(values, prefix=""):
        for name, value in values.items():
            if f"{prefix}{name}" in known:
                yield f"{prefix}{name}"
            elif isinstance(value, dict):
                yield from keys(value, f"{prefix}{name}.")
            else:
                yield f"unknown: {prefix}{name}"

    assert not [key for key in keys(held) if key.startswith("unknown")]


def test_a_section_or_a_key():
    assert [p.key for p in matching(["train.epochs"])] == ["train.epochs"]
    assert all(p.key.startswith("train.augment.") for p in matching(["train.augment"]))
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        matching(["train.epoch"])
    with pytest.raises(ConfigError, match=r"did you mean train\.epochs"):
        matching(["epochs"])


def test_the_command(capsys):
    assert main(["params", "train.epochs"]) == 0
    assert capsys.readouterr().out.startswith("train.epochs: int | None = null\n")
    assert main(["params", "nothing.of.this"]) == 2
    assert main(["params", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert table == as_markdown(matching([])) + "\n"
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert all(len(line.replace("\\|", "").split("|")) == 6 for line in rows)


@pytest.mark.slow
def test_make_docs(repository, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["reference.py", str(tmp_path)])
    runpy.run_path(str(repository / "docs" / "reference.py"), run_name="__main__")
    text = (tmp_path / "commands.md").read_text(encoding="utf-8")
    for command in ("predict", "train", "cross-validate", "pipeline", "params"):
        assert f"## distilldsm {command}\n" in text
        assert f"usage: distilldsm {command}" in text
    assert "`train.epochs`" in (tmp_path / "parameters.md").read_text(encoding="utf-8")
