"""The fragment is whole and safe to put into a page; the script that it carries is the one that was built."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import tomllib
from html.parser import HTMLParser

import pytest

from distilldsm.report.figures import COLOURS
from distilldsm.report.viewer import ViewedCase, viewer_fragment, viewer_page
from distilldsm.report.viewer.fragment import SCRIPT


class Elements(HTMLParser):
    """Elements with their attributes, and the text of each script by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.styles = ""
        self._inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts[dict(attributes).get("id")] = ""

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[self.found[-1][1].get("id")] += data
        elif self._inside == "style":
            self.styles += data


NASTY = '</script><script>alert("1")</script> & <b>'


def cases() -> list[ViewedCase]:
    return [
        ViewedCase(name=NASTY, caption=NASTY, image=b"an image", truth=b"a mask", prediction=b"another"),
        ViewedCase(name="second", image=b"an image", prediction=b"a third"),
    ]


def test_it_loads_nothing_from_elsewhere():
    page = Elements(viewer_page(NASTY, cases(), {"a": 1}))
    for tag, attributes in page.found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert not {"src", "href", "srcset", "action", "data"} & attributes.keys(), (tag, attributes)
    assert "url(" not in page.styles
    assert "@import" not in page.styles


def test_what_is_put_in_comes_out():
    page = Elements(viewer_page(NASTY, cases(), {"background": 0, NASTY: 4, "b": 9}))
    about = json.loads(page.scripts["dsm-viewer-cases"])
    assert [case["name"] for case in about["cases"]] == [NASTY, "second"]
    assert about["cases"][0]["caption"] == NASTY
    assert [(label["name"], label["value"]) for label in about["labels"]] == [(NASTY, 4), ("b", 9)]

    def content(case: int, kind: str) -> bytes | None:
        key = about["cases"][case][kind]
        return key and base64.b64decode(page.scripts[f"dsm-viewer-{key}"])

    assert [content(0, kind) for kind in ("image", "truth", "prediction")] == [b"an image", b"a mask", b"another"]
    assert [content(1, kind) for kind in ("image", "truth", "prediction")] == [b"an image", None, b"a third"]
    assert sum("octet-stream" in str(attributes.get("type")) for _, attributes in page.found) == 4 + 1  # and NiiVue
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_labels_have_the_colours_of_the_figures():
    labels = {f"l{k}": k for k in range(10)}
    found = json.loads(Elements(viewer_fragment(cases(), labels)).scripts["dsm-viewer-cases"])["labels"]
    assert [label["colour"] for label in found] == [COLOURS[k % 7] for k in range(1, 10)]
    chosen = json.loads(Elements(viewer_fragment(cases(), {"a": 2}, colours=["#010203"])).scripts["dsm-viewer-cases"])[
        "labels"
    ]
    assert chosen == [{"name": "a", "value": 2, "colour": "#010203"}]
    with pytest.raises(ValueError, match="2 labels"):
        viewer_fragment(cases(), {"a": 1, "b": 2}, colours=["#000000"])
    with pytest.raises(ValueError, match="no case"):
        viewer_fragment([], {"a": 1})


def test_a_page_without_volumes_is_small():
    assert len(viewer_fragment(cases(), {"a": 1})) < 600_000


def test_the_script_is_the_one_that_was_built(repository):
    """Hash, version and licences of the bundle agree; change them with `make viewer` only."""
    folder = repository / "distilldsm" / "report" / "viewer"
    about = json.loads((folder / "niivue.json").read_text())
    assert set(about["sha256"]) == {SCRIPT, "niivue.LICENSE.txt"}
    for name, expected in about["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name
    script = gzip.decompress((folder / SCRIPT).read_bytes()).decode()
    licences = (folder / "niivue.LICENSE.txt").read_text()
    assert script.startswith(f"/*!\n{licences}*/\n")
    for name, version in about["packages"].items():
        assert f"{name} {version} (" in licences
    assert "Redistributions in binary form must reproduce" in licences
    assert f'version:"{about["version"]}"' in script


def test_the_build_is_locked_to_that_version(repository):
    about = json.loads((repository / "distilldsm" / "report" / "viewer" / "niivue.json").read_text())
    wanted = json.loads((repository / "viewer" / "package.json").read_text())["dependencies"]
    text = (repository / "viewer" / "package-lock.json").read_text()
    locked = json.loads(text)["packages"]
    assert wanted == {"@niivue/niivue": about["version"]}
    for name, version in about["packages"].items():
        entry = locked[f"node_modules/{name}"]
        assert entry["version"] == version
        assert entry["integrity"].startswith("sha512-")
    assert '"resolved"' not in text  # where packages come from is a matter of the machine


def test_all_files_of_the_pages_are_package_data(repository):
    patterns = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = repository / "distilldsm"
    for path in (package / "report").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            name = path.relative_to(package)
            assert any(name.match(pattern) for pattern in patterns["distilldsm"]), name
