"""Downloading, unpacking and indexing: against a server that misbehaves and archives that mean harm."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

import distilldsm.data.download as download_module
from components.download import main, run
from distilldsm.config import DownloadConfig, PatternConfig, SampleConfig, load_params
from distilldsm.data.archive import extract, find_root
from distilldsm.data.catalog import CATALOG, lookup
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.download import fetch, local_path
from distilldsm.data.layouts import index_dataset
from distilldsm.data.sample import _load_template, _positions, jacobian_determinant, make_sample_archive
from distilldsm.errors import ConfigError, DataError
from distilldsm.params import from_mapping
from distilldsm.stage import file_hashes, sha256_file
from tests.data.volumes import write_case

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at /file; what goes wrong is set by the test."""

    cut_after: int | None = None
    cuts_left = 0
    ranges = True
    etag = '"one"'
    failures_left = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []

    def url(self, path: str = "/file") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append((self.path, wanted))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.end_headers()
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        if server.failures_left:
            server.failures_left -= 1
            self.send_error(503)
            return
        body = CONTENT if self.path == "/file" else b"something else"
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if server.cut_after is not None and server.cuts_left:
            server.cuts_left -= 1
            self.wfile.write(body[start : start + server.cut_after])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(body[start:])


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture
def get(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(download_module, "_CHUNK", 10_000)
    waits: list[float] = []

    def fetch_here(*urls: str, **options) -> Path:
        return fetch(urls, tmp_path / "archive.tar", sleep=waits.append, **options)

    fetch_here.waits = waits
    return fetch_here


def test_plain_download_leaves_only_the_file(server, get, tmp_path):
    assert get(server.url(), sha256=SHA256).read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["archive.tar"]


def test_a_cut_connection_is_resumed(server, get):
    server.cut_after, server.cuts_left = 100_000, 2
    assert get(server.url(), sha256=SHA256).read_bytes() == CONTENT
    starts = [0 if r is None else int(r.split("=")[1].rstrip("-")) for _, r in server.requests]
    assert starts == sorted(starts)
    assert len(starts) == 3
    assert starts[1] > 0
    assert get.waits == sorted(get.waits)


def test_a_changed_file_is_not_spliced(server, get, tmp_path):
    (tmp_path / "archive.tar.part").write_bytes(b"old bytes of another version")
    (tmp_path / "archive.tar.part.json").write_text('{"validator": "\\"zero\\""}')
    assert get(server.url(), sha256=SHA256).read_bytes() == CONTENT


def test_a_part_without_validator_is_started_again(server, get, tmp_path):
    (tmp_path / "archive.tar.part").write_bytes(b"who knows from where")
    assert get(server.url()).read_bytes() == CONTENT
    assert server.requests[0][1] is None


def test_without_range_support_it_starts_again(server, get):
    server.ranges, server.cut_after, server.cuts_left = False, 50_000, 1
    assert get(server.url(), sha256=SHA256).read_bytes() == CONTENT


def test_server_errors_are_retried_and_redirects_followed(server, get):
    server.failures_left = 2
    assert get(server.url("/moved"), sha256=SHA256).read_bytes() == CONTENT
    assert len(get.waits) == 2


def test_404_goes_to_the_mirror_at_once(server, get):
    assert get(server.url("/gone"), server.url(), sha256=SHA256).read_bytes() == CONTENT
    assert get.waits == []


def test_wrong_checksum_goes_to_the_mirror(server, get):
    assert get(server.url("/other"), server.url(), sha256=SHA256).read_bytes() == CONTENT


def test_all_answers_are_told(server, get, tmp_path):
    server.failures_left = 99
    with pytest.raises(DataError) as caught:
        get(server.url("/gone"), "http://127.0.0.1:9/x", server.url("/file"), sha256="0" * 64)
    message = str(caught.value)
    assert "HTTP 404" in message
    assert "127.0.0.1:9" in message
    assert "503" in message
    server.failures_left = 0
    with pytest.raises(DataError, match=f"wrong sha256: {SHA256}, expected 0000"):
        get(server.url(), sha256="0" * 64)
    assert not (tmp_path / "archive.tar").exists()


def test_a_file_that_is_there_is_used_again(server, get):
    get(server.url(), md5=hashlib.md5(CONTENT).hexdigest())
    get(server.url(), sha256=SHA256)
    assert len(server.requests) == 1


def test_file_addresses(tmp_path, get):
    source = tmp_path / "with space.bin"
    source.write_bytes(CONTENT)
    assert get(source.as_uri(), sha256=SHA256).read_bytes() == CONTENT
    assert local_path(source.as_uri()) == source
    with pytest.raises(DataError, match="no such file"):
        get((tmp_path / "none").as_uri(), sha256="0" * 64)


def test_no_space_left(server, get, monkeypatch):
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(DataError, match="not enough space"):
        get(server.url())


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../outside.txt"),
        member("/tmp/absolute.txt"),
        member("a/../../outside.txt"),
        member("..\\outside.txt"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard", tarfile.LNKTYPE, "good.txt"),
        member("device", tarfile.CHRTYPE),
        member("fifo", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_harmful_members_are_refused_before_anything_is_written(tmp_path, evil):
    archive = tar_of(tmp_path / "x.tar", [(member("good.txt"), b"good"), (evil, b"")])
    with pytest.raises(DataError, match=r"x\.tar"):
        extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]


def test_zip_traversal_links_and_bombs(tmp_path):
    for name in ("../x", "/x"):
        with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
            archive.writestr(name, "x")
        with pytest.raises(DataError, match="outside"):
            extract(tmp_path / "t.zip", tmp_path / "out")
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="link"):
        extract(tmp_path / "l.zip", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", b"\0" * 150_000_000)
    with pytest.raises(DataError, match="bomb"):
        extract(tmp_path / "b.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_litter_is_skipped_and_the_rest_unpacked(tmp_path):
    archive = tar_of(
        tmp_path / "x.tar",
        [
            (member("set/._a.nii"), b"mac"),
            (member("set/a.nii"), b"a"),
            (member("__MACOSX/b"), b"b"),
            (member("set/sub/b.nii"), b"b"),
        ],
    )
    extract(archive, tmp_path / "out")
    assert set(file_hashes(tmp_path / "out")) == {"set/a.nii", "set/sub/b.nii"}
    assert find_root(tmp_path / "out", "a.nii") == tmp_path / "out" / "set"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_truncated_archives_and_other_files(tmp_path, mode):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode=mode) as archive:
        info = tarfile.TarInfo("a.bin")
        info.size = len(CONTENT)
        archive.addfile(info, io.BytesIO(CONTENT))
    path = tmp_path / "x.tar"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(DataError, match="truncated"):
        extract(path, tmp_path / "out")
    path.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match="no readable archive"):
        extract(path, tmp_path / "out")


def test_catalog_agrees_with_monai():
    from monai.apps import DecathlonDataset

    assert {f"msd:{k}": v for k, v in DecathlonDataset.md5.items()} == {k: e.md5 for k, e in CATALOG.items()}
    for task, url in DecathlonDataset.resource.items():
        assert CATALOG[f"msd:{task}"].urls[0] == url
    with pytest.raises(ConfigError, match="did you mean 'msd:Task04_Hippocampus'"):
        lookup("msd:Hippocampus")


def write_msd(root: Path, cases: int = 5) -> Path:
    made = [write_case(root, f"c{k}", seed=k) for k in range(cases)]
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


def get_dataset(tmp_path: Path, **config) -> DatasetIndex:
    settings = DownloadConfig(archive_dir=str(tmp_path / "archives"), **config)
    run(settings, {}, {"dataset": tmp_path / "raw"})
    index = DatasetIndex.load(tmp_path / "raw")
    for case in index.cases:
        assert all((tmp_path / "raw" / p).is_file() for p in (*case.images, case.label))
    return index


def test_a_folder_is_copied_and_left_as_it_was(tmp_path):
    write_msd(tmp_path / "mine")
    before = file_hashes(tmp_path / "mine")
    index = get_dataset(tmp_path, source=str(tmp_path / "mine"), name="Mine", modalities={"MRI": "CT"})
    assert file_hashes(tmp_path / "mine") == before
    assert (index.name, index.licence, index.channels[0].modality) == ("Mine", "CC0", "CT")
    assert (tmp_path / "raw" / index.cases[0].label).stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["tar", "gztar", "zip"])
def test_archives_give_the_same_index_as_the_folder(tmp_path, kind):
    import shutil

    write_msd(tmp_path / "set" / "Task99_Tiny")
    archive = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "set")
    index = get_dataset(tmp_path, source=archive, sha256=sha256_file(archive))
    assert [c.id for c in index.cases] == [f"c{k}_0000" for k in range(5)]
    assert index.labels == {"background": 0, "shell": 1, "core": 2}


def test_nnunet_layout_and_patients(tmp_path):
    root = tmp_path / "Dataset007_Two"
    for patient in range(3):
        for frame in range(2):
            write_case(root, f"p{patient}_f{frame}", channels=2)
    (root / "dataset.json").write_text(
        json.dumps(
            {"channel_names": {"0": "CT", "1": "T2"}, "labels": {"background": 0, "x": 1, "y": 2}, "numTraining": 6}
        )
    )
    index = get_dataset(tmp_path, source=str(root), patient_pattern=r"(p\d+)_")
    assert index.name == "Two"
    assert [c.modality for c in index.channels] == ["CT", "MRI"]
    assert {c.patient for c in index.cases} == {"p0", "p1", "p2"}
    assert all(len(c.images) == 2 for c in index.cases)
    with pytest.raises(DataError, match=r"patient_pattern(.|\n)*p0_f0"):
        index_dataset(root, DownloadConfig(patient_pattern="(q)"), source="x")


def test_brats_layout(tmp_path):
    root = tmp_path / "MICCAI_BraTS2020_TrainingData"
    image = nib.Nifti1Image(np.zeros((4, 4, 4), dtype=np.int16), np.eye(4))
    for case in ("BraTS20_Training_001", "BraTS20_Training_002"):
        (root / case).mkdir(parents=True)
        for name in ("flair", "t1", "t1ce", "t2", "seg"):
            nib.save(image, root / case / f"{case}_{name}.nii.gz")
    index = get_dataset(tmp_path, source=str(root.parent / root.name))
    assert index.layout == "brats2020"
    assert [p.rsplit("_", 1)[1] for p in index.cases[0].images] == [
        f"{c}.nii.gz" for c in ("flair", "t1", "t1ce", "t2")
    ]
    assert index.class_values == (0, 1, 2, 4)
    (root / "BraTS20_Training_002" / "BraTS20_Training_002_t2.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 file\(s\)(.|\n)*002_t2"):
        index_dataset(root, DownloadConfig(), source="x")


def test_pattern_layout(tmp_path):
    root = tmp_path / "own"
    for split, case in (("train", "a1"), ("train", "b2"), ("test", "c3")):
        folder = root / split / case
        folder.mkdir(parents=True)
        for name in ("Flair.nii.gz", "seg.nii.gz"):
            nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), dtype=np.uint8), np.eye(4)), folder / name)
        (folder / "._seg.nii.gz").write_bytes(b"litter")
    pattern = PatternConfig(
        images=("*/{case}/Flair.nii.gz",),
        label="*/{case}/seg.nii.gz",
        channels={"Flair": "MRI"},
        labels={"background": 0, "x": 1},
    )
    index = get_dataset(tmp_path, source=str(root), layout="pattern", pattern=pattern)
    assert [(c.id, c.images) for c in index.cases] == [
        ("a1", ("train/a1/Flair.nii.gz",)),
        ("b2", ("train/b2/Flair.nii.gz",)),
        ("c3", ("test/c3/Flair.nii.gz",)),
    ]
    (root / "test" / "c3" / "Flair.nii.gz").unlink()
    with pytest.raises(DataError, match="case c3: 0 files match"):
        index_dataset(root, DownloadConfig(layout="pattern", pattern=pattern), source="x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": {"0": "background"}}, "labels"),
        ({"labels": {"background": 0, "both": [1, 2]}}, "region"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "labels"),
        ({"training": []}, "training"),
        ({"training": [{"image": "x"}]}, "training"),
        ({"training": [{"image": "../x.nii", "label": "y.nii"}]}, "outside"),
        ({"training": [{"image": "imagesTr/none.nii.gz", "label": "y.nii"}]}, "none.nii.gz"),
        ({"modality": None}, "modality"),
    ],
)
def test_broken_descriptions_are_named(tmp_path, change, words):
    root = write_msd(tmp_path / "set", 2)
    description = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**description, **change}))
    with pytest.raises(DataError, match=words):
        index_dataset(root, DownloadConfig(), source="x")


def test_unrecognised_folders_and_missing_sources(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="layout is not recognised"):
        get_dataset(tmp_path, source=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="not found"):
        get_dataset(tmp_path, source="nowhere.tar")
    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(DataError, match="wrong checksum"):
        get_dataset(tmp_path, source=str(tmp_path / "x.tar"), sha256="0" * 64)
    assert not (tmp_path / "raw").exists()
    (tmp_path / "params.yaml").write_text("download: {source: nowhere.tar}")
    assert main(["--params", str(tmp_path / "params.yaml"), "--output", str(tmp_path / "raw")]) == 1
    assert "download.source" in capsys.readouterr().err


def test_download_over_http_end_to_end(tmp_path, server, monkeypatch):
    import shutil

    write_msd(tmp_path / "set" / "T")
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "tar", tmp_path / "set"))
    monkeypatch.setattr(f"{__name__}.CONTENT", archive.read_bytes())
    index = get_dataset(tmp_path, source=server.url("/gone"), mirrors=(server.url(),))
    assert len(index.cases) == 5


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    return make_sample_archive(tmp_path_factory.mktemp("sample") / "a.tar", SampleConfig(subjects=5, seed=3))


def test_sample_is_a_labelled_cohort(sample, tmp_path):
    index = get_dataset(tmp_path, source=str(sample))
    assert index.class_names == ("background", "grey_matter", "white_matter")
    assert "no benchmark" in index.note
    assert "McGill" in index.licence
    orientations, spacings = set(), set()
    for case in index.cases:
        image = nib.load(tmp_path / "raw" / case.images[0])
        label = nib.load(tmp_path / "raw" / case.label)
        assert image.shape == label.shape
        assert np.array_equal(image.affine, label.affine)
        values, counts = np.unique(np.asarray(label.dataobj), return_counts=True)
        assert values.tolist() == [0, 1, 2]
        assert (counts / counts.sum() > 0.03).all()
        data = np.asarray(image.dataobj)
        means = [data[np.asarray(label.dataobj) == k].mean() for k in range(3)]
        assert means[2] > means[1] > means[0]
        orientations.add("".join(nib.aff2axcodes(image.affine)))
        spacings.add(tuple(np.round(image.header.get_zooms(), 3)))
    assert orientations == {"RAS", "LPS"}
    assert len(spacings) == 5
    assert all(z > 1.4 * max(x, y) for x, y, z in spacings)


def test_sample_bytes_repeat_with_the_seed(sample, tmp_path):
    again = make_sample_archive(tmp_path / "b.tar", SampleConfig(subjects=5, seed=3))
    assert sha256_file(again) == sha256_file(sample)
    other = make_sample_archive(tmp_path / "c.tar", SampleConfig(subjects=5, seed=4))
    assert sha256_file(other) != sha256_file(sample)


@pytest.mark.parametrize("seed", range(4))
def test_sample_deformations_are_invertible(seed):
    positions = _positions(_load_template()["t1"].shape, np.random.default_rng(seed))
    determinant = jacobian_determinant(positions)
    assert determinant.min() > 0.05
    assert determinant.max() - determinant.min() > 0.2


def test_real_hippocampus(hippocampus_archive, tmp_path):
    index = get_dataset(tmp_path, source=str(hippocampus_archive))
    assert len(index.cases) == 260
    assert index.class_names == ("background", "Anterior", "Posterior")
    assert index.licence == "CC-BY-SA 4.0"


@pytest.mark.parametrize(("name", "cases", "patients"), [("acdc", 200, 100), ("brats2015", 6, 6)])
def test_real_presets(name, cases, patients, tmp_path, request):
    archive = request.getfixturevalue(f"{name}_archive")
    values = yaml.safe_load((ROOT / "conf" / "dataset" / f"{name}.yaml").read_text())["download"]
    settings = from_mapping(DownloadConfig, {**values, "source": str(archive)})
    run(settings, {}, {"dataset": tmp_path / "raw"})
    index = DatasetIndex.load(tmp_path / "raw")
    assert len(index.cases) == cases
    assert len({c.patient for c in index.cases}) == patients


def test_presets_are_valid_parameters():
    for path in (ROOT / "conf" / "dataset").glob("*.yaml"):
        assert load_params(path).download.source
