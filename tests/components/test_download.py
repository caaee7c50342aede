"""The download stage: whatever the source, the same kind of output, and nothing of the user's changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from distilldsm.cli.main import main
from distilldsm.components.command import perform
from distilldsm.components.download import STAGE, run
from distilldsm.config import DownloadConfig, SampleConfig
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json, sha256_file
from distilldsm.core.hashes import MANIFEST, content_hash, file_hashes
from distilldsm.core.mapping import from_mapping
from distilldsm.data import catalog
from distilldsm.data.dataset import INDEX, DatasetIndex
from distilldsm.data.sample import NOTE
from tests.data.http_server import serving
from tests.data.volumes import write_case

ROOT = Path(__file__).resolve().parents[2]


def write_msd(root: Path, cases: int = 3) -> Path:
    made = [write_case(root, f"c{k}", shape=(6, 8, 7), seed=k) for k in range(cases)]
    (root / "notes of the user.txt").write_text("not needed")
    (root / "dataset.json").write_text(
        json.dumps(
            {
                "name": "Tiny",
                "modality": {"0": "MRI"},
                "labels": {"0": "background", "1": "shell", "2": "core"},
                "licence": "CC0",
                "training": [{"image": f"./{c.images[0]}", "label": f"./{c.label}"} for c in made],
            }
        )
    )
    return root


@pytest.fixture
def packed(tmp_path) -> Path:
    write_msd(tmp_path / "set" / "Task99_Tiny")
    return Path(shutil.make_archive(str(tmp_path / "Task99_Tiny"), "tar", tmp_path / "set"))


def get(tmp_path: Path, **config) -> DatasetIndex:
    settings = DownloadConfig(archive_dir=str(tmp_path / "archives"), **config)
    run(settings, {}, {"dataset": tmp_path / "raw"})
    index = DatasetIndex.load(tmp_path / "raw")
    wanted = {path for case in index.cases for path in (*case.images, case.label)} | {INDEX}
    assert set(file_hashes(tmp_path / "raw")) == wanted  # what is needed, and nothing else
    assert read_json(tmp_path / "raw" / MANIFEST)["config"]["source"] == settings.source
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".raw") and p.is_dir()] == []
    return index


def test_a_folder_is_copied_and_left_as_it_was(tmp_path):
    mine = write_msd(tmp_path / "mine")
    before = {p: (p.stat().st_mtime_ns, p.stat().st_nlink, p.stat().st_mode) for p in mine.rglob("*")}
    hashes = file_hashes(mine)
    index = get(tmp_path, source=str(mine))
    assert {p: (p.stat().st_mtime_ns, p.stat().st_nlink, p.stat().st_mode) for p in mine.rglob("*")} == before
    assert file_hashes(mine) == hashes
    copied = tmp_path / "raw" / index.cases[0].label
    assert not copied.is_symlink()
    assert copied.stat().st_nlink == 1
    assert index.source == "mine"


@pytest.mark.parametrize("kind", ["tar", "gztar", "bztar", "xztar", "zip"])
def test_archives_give_the_same_files_as_the_folder(tmp_path, kind):
    mine = write_msd(tmp_path / "set" / "Task99_Tiny")
    archive = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "set")
    index = get(tmp_path, source=archive, sha256=sha256_file(archive))
    assert [c.id for c in index.cases] == ["c0_0000", "c1_0000", "c2_0000"]
    assert index.labels == {"background": 0, "shell": 1, "core": 2}
    for case in index.cases:
        relative = Path(case.label).relative_to("Task99_Tiny")
        assert (tmp_path / "raw" / case.label).read_bytes() == (mine / relative).read_bytes()


def test_a_second_run_replaces_the_first(tmp_path):
    assert len(get(tmp_path, source=str(write_msd(tmp_path / "three", 3))).cases) == 3
    assert len(get(tmp_path, source=str(write_msd(tmp_path / "two", 2))).cases) == 2


def is_up_to_date(config: DownloadConfig, output: Path) -> bool:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        perform(STAGE, config, {}, output, run=lambda *_: None)
    return shown.getvalue() == "download: up to date\n"


def test_a_change_of_the_source_is_seen(tmp_path):
    mine = write_msd(tmp_path / "mine")
    config = DownloadConfig(source=str(mine), archive_dir=str(tmp_path / "archives"))
    assert not is_up_to_date(config, tmp_path / "raw")
    get(tmp_path, source=str(mine))
    assert is_up_to_date(config, tmp_path / "raw")
    assert not is_up_to_date(replace(config, name="Other"), tmp_path / "raw")
    before = content_hash(tmp_path / "raw")
    label = next((mine / "labelsTr").iterdir())
    earlier = label.stat().st_mtime_ns
    label.write_bytes(label.read_bytes())
    os.utime(label, ns=(earlier, earlier))
    assert not is_up_to_date(config, tmp_path / "raw"), "whatever time the file is said to have been modified at"
    get(tmp_path, source=str(mine))
    assert content_hash(tmp_path / "raw") == before, "the same files: nothing after it runs again"
    assert is_up_to_date(config, tmp_path / "raw")
    (mine / "labelsTr" / "notes.txt").write_text("one more file")
    assert not is_up_to_date(config, tmp_path / "raw")
    shutil.rmtree(mine)
    assert is_up_to_date(config, tmp_path / "raw"), "what was made stays good"


def test_over_http_with_a_mirror_and_without_a_second_download(tmp_path, packed, monkeypatch):
    monkeypatch.setenv("DISTILLDSM_DOWNLOAD_SIGNATURE", "signature=secret")
    with serving() as server:
        server.content = packed.read_bytes()
        address = server.url("/gone")
        index = get(tmp_path, source=address, mirrors=(server.url(),))
        assert len(index.cases) == 3
        assert index.source == server.url("/gone")
        asked = len(server.requests)
        get(tmp_path, source=address, mirrors=(server.url(),))
        assert len(server.requests) == asked


def test_two_addresses_with_one_file_name_are_two_archives(tmp_path, packed):
    with serving() as server:
        server.content = packed.read_bytes()
        assert len(get(tmp_path, source=server.url("/file?v=1")).cases) == 3
        shutil.rmtree(tmp_path / "set")
        write_msd(tmp_path / "set" / "T", 2)
        server.content = Path(shutil.make_archive(str(tmp_path / "again"), "tar", tmp_path / "set")).read_bytes()
        assert len(get(tmp_path, source=server.url("/file?v=2")).cases) == 2


def test_a_task_by_name(tmp_path, packed, monkeypatch):
    with serving() as server:
        server.content = packed.read_bytes()
        entry = catalog.CatalogEntry(
            urls=(server.url("/gone"), server.url()),
            md5=hashlib.md5(server.content).hexdigest(),
            channels={"MRI": "MRI"},
            cases=3,
            licence="CC-BY-SA 4.0",
            reference="them",
        )
        monkeypatch.setattr(catalog, "CATALOG", {"msd:Task99_Tiny": entry})
        index = get(tmp_path, source="msd:Task99_Tiny")
        assert (index.licence, index.reference) == ("CC-BY-SA 4.0", "them")
        server.content = b"damaged on the way"
        shutil.rmtree(tmp_path / "archives")
        with pytest.raises(DataError, match=rf"wrong md5(.|\n)*expected {entry.md5}"):
            get(tmp_path, source="msd:Task99_Tiny")
    with pytest.raises(ConfigError, match="did you mean 'msd:Task99_Tiny'"):
        get(tmp_path, source="msd:Task99_Tyny")


def test_file_addresses(tmp_path, packed):
    assert len(get(tmp_path, source=packed.as_uri()).cases) == 3
    assert len(get(tmp_path, source=(tmp_path / "set").as_uri()).cases) == 3


def test_the_sample_is_made_once_and_its_note_travels(tmp_path, capsys):
    index = get(tmp_path, source="sample", sample=SampleConfig(subjects=5, seed=1))
    assert len(index.cases) == 5
    assert index.note == NOTE
    assert NOTE in capsys.readouterr().out
    assert "template" in index.source
    (archive,) = (tmp_path / "archives").glob("[!.]*")
    made = archive.stat().st_mtime_ns
    get(tmp_path, source="sample", sample=SampleConfig(subjects=5, seed=1))
    assert archive.stat().st_mtime_ns == made


@pytest.mark.parametrize("key", ["source", "inside", "archive_dir"])
def test_what_the_user_gave_may_not_lie_in_the_output(tmp_path, key):
    raw = write_msd(tmp_path / "raw") if key == "source" else tmp_path / "raw"
    mine = write_msd(raw / "mine" if key == "inside" else tmp_path / "mine")
    before = file_hashes(tmp_path)
    config = {
        "source": DownloadConfig(source=str(raw)),
        "inside": DownloadConfig(source=(raw / "mine").as_uri()),
        "archive_dir": DownloadConfig(source=str(mine), archive_dir=str(tmp_path / "raw" / "archives")),
    }[key]
    with pytest.raises(ConfigError, match=r"lies in the stage's output"):
        run(config, {}, {"dataset": tmp_path / "raw"})
    assert file_hashes(tmp_path) == before


def test_a_failed_run_leaves_the_last_output_and_no_rest(tmp_path, packed):
    get(tmp_path, source=str(packed))
    before = file_hashes(tmp_path / "raw")
    broken = tmp_path / "broken.tar"
    broken.write_bytes(packed.read_bytes()[:5000])
    for source in (str(broken), "nowhere.tar", str(tmp_path / "archives")):
        (tmp_path / "archives").mkdir(exist_ok=True)
        with pytest.raises(DataError):
            get(tmp_path, source=source)
        assert file_hashes(tmp_path / "raw") == before
        assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name.startswith(".")] == []


def test_a_wrong_checksum_of_a_local_archive(tmp_path, packed):
    with pytest.raises(DataError, match=f"wrong checksum(.|\n)*{sha256_file(packed)}(.|\n)*{'0' * 64}"):
        get(tmp_path, source=str(packed), sha256="0" * 64)
    assert not (tmp_path / "raw").exists()


def test_a_local_archive_that_is_gone_comes_from_the_mirror(tmp_path, packed):
    with serving() as server:
        server.content = packed.read_bytes()
        assert len(get(tmp_path, source=str(tmp_path / "gone.tar"), mirrors=(server.url(),)).cases) == 3


def test_the_command_line(tmp_path, packed, capsys):
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump({"download": {"source": str(packed), "archive_dir": str(tmp_path / "a")}}))
    assert main(["download", "--params", str(params), "--output", str(tmp_path / "raw")]) == 0
    assert "Tiny: 3 cases of 3 patients, labels shell, core" in capsys.readouterr().out
    params.write_text("download: {source: nowhere.tar}")
    assert main(["download", "--params", str(params), "--output", str(tmp_path / "raw")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: download.source")
    assert "nowhere.tar" in error
    params.write_text("download: {sorce: x}")
    assert main(["download", "--params", str(params), "--output", str(tmp_path / "raw")]) == 2
    assert "did you mean 'source'" in capsys.readouterr().err


def test_real_hippocampus(hippocampus_archive, tmp_path):
    before = (hippocampus_archive.stat().st_mtime_ns, hippocampus_archive.stat().st_size)
    index = get(tmp_path, source=str(hippocampus_archive))
    assert len(index.cases) == 260
    assert index.class_names == ("background", "Anterior", "Posterior")
    assert [c.modality for c in index.channels] == ["MRI"]
    assert index.licence == "CC-BY-SA 4.0"
    assert (hippocampus_archive.stat().st_mtime_ns, hippocampus_archive.stat().st_size) == before


@pytest.mark.parametrize(
    ("name", "cases", "patients", "channels", "values"),
    [("acdc", 200, 100, 1, (0, 1, 2, 3)), ("brats2015", 6, 6, 2, (0, 1, 2, 3, 4))],
)
def test_real_data_through_its_preset(name, cases, patients, channels, values, tmp_path, request):
    archive = request.getfixturevalue(f"{name}_archive")
    preset = yaml.safe_load((ROOT / "conf" / "dataset" / f"{name}.yaml").read_text())["download"]
    config = from_mapping(DownloadConfig, {**preset, "source": str(archive)})
    index = get(tmp_path, **{key: getattr(config, key) for key in preset} | {"source": str(archive)})
    assert len(index.cases) == cases
    assert len({c.patient for c in index.cases}) == patients
    assert len(index.channels) == channels
    assert all(len(c.images) == channels for c in index.cases)
    assert index.class_values == values
    assert {c.modality for c in index.channels} == {"MRI"}


def test_a_kept_archive_that_was_damaged_is_made_again(tmp_path):
    """A tar has no checksum of its contents. Its date and size tell nothing."""
    get(tmp_path, source="sample")
    (archive,) = (tmp_path / "archives").glob("sample-*.tar")
    whole, state = archive.read_bytes(), archive.stat()
    archive.write_bytes(whole[:-2000] + bytes(2000))
    os.utime(archive, ns=(state.st_atime_ns, state.st_mtime_ns))
    get(tmp_path, source="sample")
    assert archive.read_bytes() == whole
