"""Trained models by name: listed, fetched, checked, and found by `predict`."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from distilldsm.cli.main import main
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.hashes import sha256_file
from distilldsm.models import catalogue
from distilldsm.models.catalogue import Catalogue, installed, model_directory, pull


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder of models, an archive of a model, and a catalogue that names it. The file hashes are not the point."""
    monkeypatch.setenv("DISTILLDSM_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(catalogue, "SHIPPED", tmp_path / "pretrained")
    monkeypatch.setattr(
        catalogue, "verify", lambda root: json.loads((root / "metadata.json").read_text())["sound"] or fail()
    )
    source = tmp_path / "source" / "inner"
    source.mkdir(parents=True)
    (source / "metadata.json").write_text('{"sound": true}')
    (source / "model.xml").write_text("x")
    archive = tmp_path / "brain.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(source, "brain-1.0")
    entry = {"title": "Brain", "input": "a head", "licence": "CC0", "reference": "we", "card": "https://x/card"}
    listed = {"brain": {**entry, "address": str(tmp_path / "gone.tar"), "mirrors": [str(archive)]}, "own": entry}
    listed["brain"]["sha256"] = sha256_file(archive)
    (tmp_path / "catalogue.json").write_text(json.dumps({"schema_version": 1, "models": listed}))
    monkeypatch.setattr(Catalogue.load.__func__, "__defaults__", (tmp_path / "catalogue.json",))
    return tmp_path


def fail():
    raise DataError("is damaged")


def test_a_name_stands_for_its_directory_once_it_is_fetched(world, capsys, monkeypatch):
    listing = ["models", "--catalogue", str(world / "catalogue.json")]
    assert main(listing) == 0
    assert "brain               Brain; CC0; not here: distilldsm models pull brain" in capsys.readouterr().out
    with pytest.raises(DataError, match="hint: distilldsm models pull brain"):
        model_directory("brain")
    assert main(["models", "pull", "brain", "--catalogue", str(world / "catalogue.json")]) == 0
    assert "Licence: CC0. Input: a head" in capsys.readouterr().out
    place = world / "models" / "brain"
    assert model_directory("brain") == place
    assert sorted(p.name for p in place.iterdir()) == ["metadata.json", "model.xml"]
    assert [p.name for p in place.parent.iterdir()] == ["brain"], "nothing else is left"
    (world / "brain").mkdir()
    monkeypatch.chdir(world)
    assert model_directory("brain") == Path("brain"), "a directory goes before a name"
    assert main([*listing, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["installed"] == {"brain": str(place)}


def test_models_of_the_package_are_there_and_go_first(world):
    for folder in ("pretrained/own", "models/own", "models/other"):
        (world / folder).mkdir(parents=True)
        (world / folder / "metadata.json").write_text("{}")
    (world / "models" / "no_model").mkdir()
    assert installed() == {"own": world / "pretrained/own", "other": world / "models/other"}
    with pytest.raises(ConfigError, match="ships with the package"):
        pull("own", catalogue=world / "catalogue.json")


def test_what_is_not_a_sound_model_is_not_installed(world):
    archive = world / "brain.tar.gz"
    with pytest.raises(DataError, match="wrong sha256"):
        pull(str(archive), sha256="0" * 64)
    shutil.copy(archive, world / "no.archive")
    (world / "source" / "inner" / "metadata.json").write_text('{"sound": false}')
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(world / "source" / "inner", "brain-1.0")
    with pytest.raises(DataError, match="is damaged"):
        pull(str(archive))
    assert installed() == {}
    with pytest.raises(DataError, match="could not be fetched"):
        pull("brain", catalogue=world / "catalogue.json")  # its archive has changed
    with pytest.raises(ConfigError, match=r"not in the catalogue(.|\n)*did you mean 'brain'"):
        pull("brian", catalogue=world / "catalogue.json")


def test_an_archive_gives_its_own_name(world):
    assert pull(str(world / "brain.tar.gz")) == world / "models" / "brain"
    renamed = shutil.copy(world / "brain.tar.gz", world / "-x.tar")
    with pytest.raises(ConfigError, match="gives the model no name"):
        pull(str(renamed))
    for address in ("http://user:pl4nted@", "http://h/a b#pl4nted", "http://h/-?pl4nted", "http://u:x?pl4nted@h/-"):
        with pytest.raises(ConfigError, match="gives the model no name") as caught:
            pull(address)
        assert "pl4nted" not in str(caught.value)


def test_paths_and_unknown_names(world):
    assert model_directory("export/fold0") == Path("export/fold0")
    with pytest.raises(DataError, match=r"no such directory(.|\n)*export/fold0"):
        model_directory("nothing_like_it")


def test_the_packages_catalogue_is_sound():
    for entry in Catalogue.load(catalogue.CATALOGUE).models.values():
        assert entry.licence
        assert (entry.address is None) == (entry.sha256 is None)


def test_an_address_needs_a_checksum(tmp_path):
    path = tmp_path / "c.json"
    entry = {"title": "t", "input": "i", "licence": "l", "reference": "r", "card": "c", "address": "https://x/y.tar"}
    path.write_text(json.dumps({"models": {"x": entry}}))
    with pytest.raises(DataError, match="64 hexadecimal digits"):
        Catalogue.load(path)
