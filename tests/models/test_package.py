"""An exported model directory: what it says, and that a changed byte is noticed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.cli.info import _print_model
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.hashes import MANIFEST, sha256_file
from distilldsm.data.plan import Normalisation
from distilldsm.export.build import describe_normalisation
from distilldsm.export.card import model_card
from distilldsm.export.scores import Scores
from distilldsm.inference.loading import load_exported
from distilldsm.models.package import (
    HASHED_FILES,
    INT8_FILES,
    MONAI_BUNDLE,
    RUNTIME_FILES,
    load_metadata,
    model_name,
    verify,
)
from tests.export.fake import exported


@pytest.fixture
def package(tmp_path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(exported(tmp_path_factory).export, tmp_path / "package"))


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_an_untouched_package_is_accepted(package):
    metadata = verify(package)
    bundle = {name for name in metadata.files if name.startswith(f"{MONAI_BUNDLE}/")}
    assert set(metadata.files) - bundle == {*HASHED_FILES, *INT8_FILES}
    assert bundle == {str(p.relative_to(package)) for p in (package / MONAI_BUNDLE).rglob("*") if p.is_file()}
    assert metadata == load_metadata(package)


@pytest.mark.parametrize("name", [*HASHED_FILES, *INT8_FILES, "metadata.json"])
def test_a_changed_byte_is_found_and_named(package, name):
    if name == "metadata.json":  # still valid JSON: only the hash can tell
        path = package / name
        path.write_text(path.read_text().replace("research;", "clinical;"))
    else:
        flip_byte(package / name)
    with pytest.raises(DataError, match="has changed since the export") as caught:
        verify(package)
    assert caught.value.where == str(package / name)


def test_only_the_named_files_are_checked(package):
    flip_byte(package / "model.onnx")
    verify(package, RUNTIME_FILES["openvino"])
    with pytest.raises(DataError, match=r"model\.onnx"):
        verify(package, RUNTIME_FILES["onnx"])


def test_missing_files_are_named(package):
    (package / "model.bin").unlink()
    with pytest.raises(DataError, match=r"model\.bin: is missing"):
        verify(package)
    with pytest.raises(DataError, match="has no hash of weights"):
        verify(package, ["weights"])
    (package / "metadata.json").unlink()
    with pytest.raises(DataError, match=r"is not an exported model\n  seen: no metadata\.json"):
        verify(package)
    with pytest.raises(DataError, match="no such directory"):
        verify(package / "nowhere")


def test_a_package_without_manifest_is_checked_by_its_metadata(package):
    (package / MANIFEST).unlink()
    verify(package)
    flip_byte(package / "model.bin")
    with pytest.raises(DataError, match=r"model\.bin"):
        verify(package)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": 3}'])
def test_a_damaged_manifest_is_an_error(package, content):
    (package / MANIFEST).write_text(content)
    with pytest.raises(DataError, match="has no file hashes"):
        verify(package)


def test_only_labels_can_be_post_processed(package):
    path = package / "metadata.json"
    write_json(path, read_json(path) | {"postprocessing": ["background"]})
    with pytest.raises(DataError, match="'postprocessing' names an unknown label"):
        load_metadata(package)


def region(name: str, *values: int) -> dict:
    return {"name": name, "values": list(values), "written_as": values[0]}


def test_post_processing_of_regions_is_described_and_checked(package, capsys):
    path = package / "metadata.json"
    content = read_json(path) | {"regions": [region("whole", 1, 2), region("inner", 2)]}
    write_json(path, content | {"postprocessing": ["whole"]})
    metadata = load_metadata(package)
    card = model_card(metadata, plan_spacing_mm=(1.0, 1.0, 1.0), summary={})
    assert "largest connected component of whole (removed voxels leave all regions)" in card
    write_json(path, content | {"postprocessing": ["inner"]})
    with pytest.raises(DataError, match=r"cannot be post-processed(.|\n)*seen: .*inner(.|\n)*rule: whole"):
        load_metadata(package)
    labels = content["labels"] | {"third": 3}
    crossed = {"labels": labels, "regions": [region("a", 1, 2), region("b", 2, 3)], "postprocessing": []}
    write_json(path, content | crossed)
    _print_model(load_metadata(package))
    assert "none: not tried, as regions overlap" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        *({"schema_version": 2}, {"labels": ["a"]}, {"surprise": 1}, {"network": {"name": "distill_dsm"}}),
        *({"labels": labels} for labels in ({"a": 0, "b": 256}, {"a": 0, "b": -1}, {"a": 0, "b": 0}, {"a\x1b": 0})),
        *({"network": {"stride": stride}} for stride in ([0, 1, 1], [1, 1, 1 << 40], [-1, 1, 1])),
        *({"network": {"depth_halo": halo}} for halo in (-1, 1 << 40)),
        {"name": "a\nerror: b"},
    ],
    ids=str,
)
def test_damaged_newer_or_impossible_metadata_are_data_errors(package, change):
    path = package / "metadata.json"
    content = read_json(path)
    if "network" in change and "name" not in change["network"]:
        change = {"network": content["network"] | change["network"]}
    write_json(path, content | change)
    with pytest.raises(DataError, match=r"metadata\.json"):
        load_metadata(package)


def test_files_that_do_not_belong_together(package):
    """Each hash is right, but the network, the plan and the metadata are not of one export."""
    (package / MANIFEST).unlink()
    metadata, plan = read_json(package / "metadata.json"), read_json(package / "plan.json")
    fewer = {key: plan[key][:1] for key in ("channels", "normalisation")}
    one_channel = metadata["inputs"][0] | {"shape": [1, 1, None, None, None]}
    others = ({"labels": {"background": 0, "core": 1, "shell": 2}}, {"channels": metadata["channels"][::-1]})
    for change, changed_plan, seen in (
        (others[0], {}, "labels"),
        (others[1], {}, "channels"),
        ({"channels": metadata["channels"][:1]}, fewer, "shapes"),
        ({"channels": metadata["channels"][:1], "inputs": [one_channel]}, fewer, "network"),
    ):
        write_json(package / "plan.json", plan | changed_plan)
        files = metadata["files"] | {"plan.json": sha256_file(package / "plan.json")}
        write_json(package / "metadata.json", metadata | change | {"files": files})
        for runtime in ("openvino", "onnx"):
            with pytest.raises(DataError, match=rf"do not belong together\n  seen: {seen}: (.|\n)*as plan.json"):
                load_exported(package, runtime=runtime)


def test_the_metadata_tell_what_a_user_needs(package):
    metadata = json.loads((package / "metadata.json").read_text())
    assert metadata["intended_use"] == "research; not a medical device"
    assert metadata["name"] == "distilldsm-ellipsoids"
    assert metadata["inputs"] == [
        {
            "name": "image",
            "dtype": "float32",
            "shape": [1, 2, None, None, None],
            "axes": ["batch", "channel", "depth", "height", "width"],
            "multiple_of": [1, 1, 1],
        }
    ]
    assert metadata["outputs"][0]["shape"] == [1, 3, None, None, None]
    assert [(c["name"], c["modality"]) for c in metadata["channels"]] == [("T0", "MRI"), ("T1", "MRI")]
    assert metadata["labels"] == {"background": 0, "shell": 1, "core": 2}
    network = metadata["network"]
    assert (network["name"], network["options"]) == ("distill_dsm", {"width": 0.5, "alpha": 0.5})
    assert (network["stride"], network["depth_halo"]) == ([1, 1, 1], 8)
    assert (metadata["fold"], metadata["checkpoint"]) == (1, "last")
    assert {"torch", "onnx", "openvino", "distilldsm"} <= set(metadata["versions"])
    assert metadata["data"]["licence"] == "unknown"


def test_the_card_names_use_data_and_limits(package):
    metadata = load_metadata(package)
    data = replace(metadata.data, licence="CC-BY-SA 4.0", note="from one template", name="<b>|[x](http://h)\n# y")
    noted = replace(metadata, data=data)
    row = {"max_logit_difference": 1e-5, "voxel_difference": 5e-5, "dice_difference": 1e-4}
    cases = {c: {"shell": {"dice": d, "hd95_mm": 1.0, "nsd": 0.5}} for c, d in {"a": 0.8, "b": 0.9}.items()}
    facts = {"fold": 1, "checkpoint": "last", "data_hash": "", "split_hash": ""}
    scores = Scores(source="evaluation", labels=("shell",), cases=cases, **facts)
    card = model_card(noted, plan_spacing_mm=(2.0, 1.0, 1.0), summary={"onnx": row}, scores=scores)
    for text in (
        "CC-BY-SA 4.0",
        "**from one template**",
        "2 x 1 x 1 mm",
        "0.0050 %",
        "T0.nii.gz T1.nii.gz",
        "| core | 2 |",
        "Means over 2 cases",
        "| | Dice | HD95 mm | NSD |\n|---|---|---|---|\n| shell | 0.8500 | 1.00 | 0.5000 |\n",
        r"- name: \<b\>\|\[x\](http://h) # y",
    ):
        assert text in card
    assert "Not a medical device" in card


def test_normalisations_in_words():
    ct = Normalisation(scheme="ct", low=-100, high=240, mean=80, sd=40)
    assert describe_normalisation(ct) == "clipped to [-100, 240], minus 80, divided by 40"
    assert "zero stays zero" in describe_normalisation(Normalisation(scheme="zscore_foreground"))
    assert describe_normalisation(Normalisation(scheme="none")) == "none"


@settings(deadline=None)
@given(st.text())
def test_registered_names_hold_safe_characters_only(text):
    name = model_name(text)
    assert name.startswith("distilldsm-")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not name.endswith("-")
