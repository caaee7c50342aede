"""Which store an output's results go to: of copied, moved and temporary projects, and of odd paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distilldsm.tracking.addresses import default_uri, keeps_nothing, recorded, sqlite_path, sqlite_uri
from distilldsm.tracking.publish import Publisher, publish
from distilldsm.tracking.store import Store
from tests.tracking.store import all_runs, evaluated, run_of, trained, training


def test_where_a_recorded_store_is_now(place, client, no_sender, monkeypatch):
    """The password moves to the environment; a moved SQLite file is found; another server is not meant."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:p@host")
    assert Publisher(trained(place / "models/fold0")).uri == "http://host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert Publisher(place / "models/fold0").uri == "http://host"
    evaluated(place / "evaluation/fold0", place / "models/fold0")
    assert run_of(place / "evaluation/fold0")["tracking_uri"] == "http://other", "the server's name here"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////gone/mlflow.db")
    trained(place / "models/fold1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Publisher(place / "models/fold1").uri == f"sqlite:///{place}/mlflow.db"


def test_a_copied_or_moved_project_uses_its_own_store(place, no_sender, monkeypatch):
    one, two, three = (place / name for name in ("one", "two", "three"))
    one.mkdir()
    monkeypatch.chdir(one)
    trained(Path("models/fold0"))
    publish(Path("models/fold0"))
    shutil.copytree(one, two)
    monkeypatch.chdir(two)
    assert evaluated(Path("evaluation/fold0"), Path("models/fold0"), test_dice_mean=0.5)
    publish(Path("evaluation/fold0"))
    found = [[run.data.metrics.get("test_dice_mean") for run in all_runs(Store(sqlite_uri(p / "mlflow.db")).client)]
             for p in (one, two)]  # fmt: skip
    assert found == [[None], [0.5]]
    two.rename(three)
    monkeypatch.chdir(three)
    assert Publisher(Path("models/fold0")).uri == sqlite_uri(three / "mlflow.db")
    assert Publisher(one / "models/fold0").uri == sqlite_uri(one / "mlflow.db"), "an output of another project"
    assert not two.exists()


def test_a_store_whose_folder_is_gone_is_not_made_again(place, no_sender, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(place / "old" / "mlflow.db"))
    model = trained(place / "models/fold0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    outcome = publish(model)
    assert "the folder of the recorded store is gone" in outcome.problems[0]
    assert not (place / "old").exists()


def test_an_experiment_in_a_temporary_copy_uses_the_projects_store(place, no_sender, monkeypatch):
    copy = place / ".dvc" / "tmp" / "exps" / "tmp1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(place))
    model = trained(Path("models/fold0"))
    assert Publisher(model).uri == default_uri() == sqlite_uri(place / "mlflow.db")
    assert run_of(model)["tracking_uri"] == "sqlite:///mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(place / "elsewhere"))
    assert default_uri() == sqlite_uri(copy / "mlflow.db")


def test_signs_of_addresses_may_be_in_paths(place, no_sender, monkeypatch):
    odd = place / "a%41?b#c d"
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert sqlite_path(default_uri()) == odd / "mlflow.db"
    assert recorded(default_uri()) == "sqlite:///mlflow.db"
    outcome = publish(trained(Path("models/fold0")))
    assert (outcome.is_complete, outcome.problems) == (True, ())
    assert (odd / "mlflow.db").is_file()
    assert list((odd / "mlartifacts").rglob("best.bin"))


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?cache=shared"])
def test_the_terminal_shows_the_store_and_warns_of_one_in_memory(place, no_sender, monkeypatch, capsys, caplog, uri):
    with training(place / "models/fold0"):
        assert f"in sqlite:///{place}/mlflow.db" in capsys.readouterr().err
    assert caplog.text == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert keeps_nothing(uri)
    with training(place / "models/fold1"):
        assert "it keeps nothing" in caplog.text
