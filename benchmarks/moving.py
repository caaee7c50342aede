"""Measures what KFP moves for a step's output: file by file as KFP does, and packed as the data steps do.

    python -m benchmarks.moving data/raw data/preprocessed

Prints a JSON line for each directory. An S3 server in this process (moto) takes and gives one file after the other, so
the seconds are those of the requests on one machine, without a network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from distilldsm.pipeline.packing import pack, unpacked

BUCKET = "bucket"


def files_of(root: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def moved(s3: Any, root: Path, target: Path) -> dict[str, float]:
    """Upload a directory and download it to `target`, one file after the other."""
    files, began = files_of(root), time.perf_counter()
    for file in files:
        s3.upload_file(str(file), BUCKET, f"{target.name}/{file.relative_to(root)}")
    uploaded = time.perf_counter()
    for file in files:
        there = target / file.relative_to(root)
        there.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(BUCKET, f"{target.name}/{file.relative_to(root)}", str(there))
    downloaded = time.perf_counter()
    size = sum(file.stat().st_size for file in files)
    seconds = {"upload_s": round(uploaded - began, 1), "download_s": round(downloaded - uploaded, 1)}
    return {"files": len(files), "megabytes": round(size / 1e6, 1), **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", help="outputs of stages")
    directories = parser.parse_args().directories
    import boto3  # type: ignore[import-untyped]
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    s3 = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    s3.create_bucket(Bucket=BUCKET)
    for directory in directories:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plain = moved(s3, directory, folder / "plain")
            copy = shutil.copytree(directory, folder / "copy")
            began = time.perf_counter()
            pack(copy)
            packing_s = time.perf_counter() - began
            packed = moved(s3, copy, folder / "packed")
            began = time.perf_counter()
            unpacked(folder / "packed", "", folder / "unpacked")
            unpacking_s = time.perf_counter() - began
        packed |= {"pack_s": round(packing_s, 1), "unpack_s": round(unpacking_s, 1)}
        print(json.dumps({"directory": str(directory), "file_by_file": plain, "packed": packed}), flush=True)
    server.stop()


if __name__ == "__main__":
    main()
