"""Stage download: fetches labelled volumes into `data/raw` and writes an index of the cases."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from distilldsm.core.errors import DataError
from distilldsm.core.files import sha256_file, sha256_json, write_json
from distilldsm.core.hashes import is_as_kept, keep, read_if_whole, state_of
from distilldsm.core.output_directory import output_directory
from distilldsm.core.redaction import public_address
from distilldsm.core.stage import WORK_VARIABLE, Output, Stage

if TYPE_CHECKING:
    from distilldsm.config import DownloadConfig
    from distilldsm.data.dataset import DatasetIndex


def run(config: DownloadConfig, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Fetch, unpack and index a data set.

    Args:
        inputs: none.
        outputs: `dataset`: the files that the cases need, and `dataset_index.json`.

    The user's files are copied, never linked or changed.
    """
    import tempfile

    from distilldsm.core.progress import progress
    from distilldsm.data.archive import extract
    from distilldsm.data.download import local_path
    from distilldsm.data.layouts import needed_files

    source = None if config.source.startswith("msd:") else local_path(config.source)
    STAGE.keep_apart(outputs["dataset"], source=source, archive_dir=Path(config.archive_dir))
    states = _states(source)
    with output_directory(outputs["dataset"], **STAGE.key(config, inputs)) as work:
        source, name = _obtain(config)
        # Unpack inside the output's work directory: moving files there is cheap, and the next run cleans up after a
        # killed one.
        with tempfile.TemporaryDirectory(dir=work, prefix=".unpacked-") as scratch:
            unpacked = source if source.is_dir() else extract(source, scratch)
            index = _index(unpacked, config, name)
            needed = needed_files(index)
            title = "copy" if unpacked is source else "move"
            for path in progress(needed, total=len(needed), title=title, unit="file", brief=True):
                target = work / path
                target.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copyfile if unpacked is source else shutil.move)(unpacked / path, target)
        index.save(work)
    write_json(_record(outputs["dataset"]), states)
    patients = len({case.patient for case in index.cases})
    print(f"{index.name}: {len(index.cases)} cases of {patients} patients, labels {', '.join(index.class_names[1:])}")
    if index.note:
        print(index.note)


def facts(inputs: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """Name, size, channels, labels and origin of the data set."""
    from distilldsm.data.dataset import DatasetIndex

    index = DatasetIndex.load(output)
    return {
        "name": index.name,
        "cases": len(index.cases),
        "patients": len({case.patient for case in index.cases}),
        "channels": [channel.name for channel in index.channels],
        "labels": dict(index.labels),
        "licence": index.licence,
        "source": index.source,
    }


def outdated(config: DownloadConfig, output: Path) -> bool:
    """Whether a local source has changed since `output` was written."""
    from distilldsm.data.download import local_path

    path = None if config.source == "sample" or config.source.startswith("msd:") else local_path(config.source)
    if path is None or not path.exists():
        return False
    return read_if_whole(_record(output)) != _states(path)


def _record(output: Path) -> Path:
    """File with the states of a local source. It lies beside the output."""
    return output.with_name(f".{output.name}.source.hashes.json")


def _states(source: Path | None) -> dict[str, list[int] | None]:
    """Size, times and inode of a local source and all below it."""
    if source is None or not source.exists():
        return {}
    return {str(entry): state_of(entry) for entry in (source, *sorted(source.rglob("*")))}


def _index(unpacked: Path, config: DownloadConfig, name: str) -> DatasetIndex:
    from distilldsm.data.catalog import lookup
    from distilldsm.data.layouts import index_dataset

    if config.source.startswith("msd:"):
        entry = lookup(config.source)
        config = replace(config, licence=config.licence or entry.licence, reference=config.reference or entry.reference)
    return index_dataset(unpacked, config, source=name)


def _obtain(config: DownloadConfig) -> tuple[Path, str]:
    """The archive or folder on this machine, and the name of its source."""
    import hashlib
    import tempfile

    from distilldsm.data.catalog import lookup
    from distilldsm.data.dataset import SAMPLE_SOURCE
    from distilldsm.data.download import Credentials, fetch, is_url, local_path

    store = Path(config.archive_dir)
    if not os.access(Path.cwd(), os.W_OK):  # a container with a read-only file system
        store = Path(os.environ.get(WORK_VARIABLE) or tempfile.gettempdir()) / store
    if config.source == "sample":
        from distilldsm.data.sample import VERSION, make_sample_archive

        # The name depends on version and parameters: other parameters give another archive.
        archive = store / f"sample-v{VERSION}-{sha256_json(config.sample)[:12]}.tar"
        if not is_as_kept(archive):
            make_sample_archive(archive, config.sample)
            keep(archive)
        return archive, SAMPLE_SOURCE
    if config.source.startswith("msd:"):
        entry = lookup(config.source)
        target = store / entry.urls[0].rsplit("/", 1)[-1]
        md5 = None if config.sha256 else entry.md5
        return fetch([*entry.urls, *config.mirrors], target, sha256=config.sha256, md5=md5), entry.urls[0]
    path = local_path(config.source)
    if path is not None and not is_url(config.source) and not path.exists() and not config.mirrors:
        raise DataError(
            "file or folder not found",
            where="download.source",
            seen=config.source,
            rule="sample, msd:TASK, an http(s):// or file:// address, or a path",
        )
    if path is not None and path.is_dir():
        return path, path.name
    if path is not None and path.is_file():
        if config.sha256 and (seen := sha256_file(path)) != config.sha256.lower():
            raise DataError(
                "wrong checksum",
                where=path,
                seen=seen,
                rule=f"download.sha256 is {config.sha256}",
                hint="get the file again, or correct download.sha256",
            )
        return path, path.name
    credentials = Credentials.from_environment(config.source) if path is None else None
    name = unquote(urlsplit(config.source).path).rsplit("/", 1)[-1] or "archive"
    # Two addresses may end in the same name: the hash keeps their files apart.
    digest = hashlib.sha256(config.source.encode(errors="surrogateescape")).hexdigest()
    target = store / f"{digest[:8]}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)[-100:]}"
    public = public_address(config.source) if is_url(config.source) else name
    return fetch([config.source, *config.mirrors], target, sha256=config.sha256, credentials=credentials), public


STAGE = Stage(
    name="download",
    help="fetch the labelled volumes (or make the embedded sample), extract and index them",
    section="download",
    outputs=(Output(name="dataset", path="data/raw", kind="Dataset"),),
    scope="data",
    image="data",
    run=run,
    code=("data", "io"),
    facts=facts,
    outdated=outdated,
)


if __name__ == "__main__":
    from distilldsm.components.command import main

    raise SystemExit(main(STAGE))
