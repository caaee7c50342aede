"""Damages of whole files: lost, cut short, flipped bits, something else under the name of a volume."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.damages.damage import damage, simple
from benchmarks.damages.nifti import header, raw, store
from distilldsm.data.dataset import Case

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 27000\n"
PAGE = b"<!DOCTYPE html><html><body><h1>403 Forbidden</h1></body></html>"


def _content(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.nii.gz")


def _cut(share: float) -> Callable[[Path], object]:
    return lambda p: p.write_bytes(p.read_bytes()[: int(p.stat().st_size * share)])


def _noughts(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)


def _checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 0xFF  # the checksum stands eight bytes before the end
    path.write_bytes(content)


simple("image_missing", "image", Path.unlink, readable="image")
simple("label_missing", "label", Path.unlink, readable="label")
simple("both_missing", "both", Path.unlink, readable="label")
simple("image_a_folder", "image", _folder, readable="image")
simple("label_link_to_nowhere", "label", _dangling, readable="label")
simple("image_empty_file", "image", _content(b""), readable="image")
simple("label_empty_file", "label", _content(b""), readable="label")
simple("image_web_page", "image", _content(PAGE), readable="image")
simple("label_lfs_pointer", "label", _content(POINTER), readable="label")
simple("image_dicom", "image", _content(bytes(128) + b"DICM" + bytes(2000)), readable="image")
simple("image_png", "image", _content(b"\x89PNG\r\n\x1a\n" + bytes(500)), readable="image")
simple("compressed_twice", "image", lambda p: store(p, p.read_bytes()), readable="image")
simple("other_compression", "image", lambda p: p.write_bytes(zlib.compress(bytes(raw(p)))), readable="image")
simple("gzip_cut_in_half", "image", _cut(0.5), readable="image")
simple("gzip_cut_at_the_end", "image", _cut(0.98), readable="image")
simple("gzip_without_its_checksum", "image", lambda p: p.write_bytes(p.read_bytes()[:-8]), readable="image")
simple("label_gzip_cut", "label", _cut(0.6), readable="label")
simple("gzip_half_noughts", "image", _noughts, readable="image")
simple("gzip_checksum_wrong", "image", _checksum, readable="image")
simple("label_gzip_checksum_wrong", "label", _checksum, readable="label")
simple("voxels_cut", "image", lambda p: store(p, raw(p)[: len(raw(p)) * 2 // 3]), readable="image")
simple("header_only", "image", lambda p: store(p, raw(p)[:352]), readable="image")
simple("header_cut", "image", lambda p: store(p, raw(p)[:200]), readable="image")
simple("bytes_too_many", "image", lambda p: store(p, raw(p) + bytes(5000)), bytes_as_declared="image")
simple("label_bytes_too_many", "label", lambda p: store(p, raw(p) + b"end"), bytes_as_declared="label")


def _flip(path: Path, rng: np.random.Generator, bits: int) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(bits):
        at = int(rng.integers(len(content) // 5, len(content) * 4 // 5))
        content[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


@damage(readable="image")
def gzip_one_bit(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    _flip(root / cases[0].images[0], rng, 1)


@damage(readable="label")
def label_gzip_one_bit(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    _flip(root / cases[0].label, rng, 1)


@damage(readable="image")
def stored_without_compression_one_bit(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    """In a block that is stored as it is nothing but the checksum tells."""
    path = root / cases[0].images[0]
    path.write_bytes(gzip.compress(bytes(raw(path)), 0, mtime=0))
    _flip(path, rng, 1)


@damage(readable="image")
def random_bytes(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    (root / cases[0].images[0]).write_bytes(rng.bytes(3000))


@damage(readable="image")
def wrong_byte_order_of_the_header(root: Path, cases: Sequence[Case], rng: np.random.Generator) -> None:
    path = root / cases[0].images[0]
    header(path, dim=np.frombuffer(raw(path)[40:56], ">i2"), sizeof_hdr=1543569408)
