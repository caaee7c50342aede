"""Layouts: what is recognised, what is told of what is missing, and the three real data sets."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.config import DownloadConfig, PatternConfig
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.descriptions import ignored_of, labels_of, modality_of
from distilldsm.data.layouts import index_dataset, needed_files
from distilldsm.data.patterns import matches
from tests.data.volumes import write_case

PEEKED = {"background": 0, "x": 1}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def index(root: Path, **config) -> DatasetIndex:
    found = index_dataset(root, DownloadConfig(**config), source="x")
    for path in needed_files(found):
        assert (root / path).is_file()
    return found


def write_msd(root: Path, cases: int = 3, **change) -> Path:
    names = [f"c{k}.nii.gz" for k in range(cases)]
    touch(root, *(f"{folder}/{n}" for n in names for folder in ("imagesTr", "labelsTr")))
    description = {
        "name": "Tiny",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "licence": "CC0",
        "note": "for tests",
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names],
    } | change
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def write_nnunet(root: Path, ids: tuple[str, ...] = ("a", "b"), channels: int = 2, **change) -> Path:
    touch(root, *(f"imagesTr/{i}_{k:04d}.nii.gz" for i in ids for k in range(channels)))
    touch(root, *(f"labelsTr/{i}.nii.gz" for i in ids))
    description = {
        "channel_names": {str(k): f"T{k + 1}" for k in range(channels)},
        "labels": PEEKED,
        "numTraining": len(ids),
        "file_ending": ".nii.gz",
    } | change
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def write_brats(root: Path, *cases: str, suffix: str = ".nii") -> Path:
    kinds = ("flair", "t1", "t1ce", "t2", "seg")
    touch(root, *(f"{case}/{case}_{kind}{suffix}" for case in cases for kind in kinds))
    return root


def test_msd(tmp_path):
    found = index(write_msd(tmp_path))
    assert (found.layout, found.name, found.licence, found.note) == ("msd", "Tiny", "CC0", "for tests")
    assert found.labels == {"background": 0, "shell": 1, "core": 2}
    case = found.cases[0]
    assert (case.id, case.patient, case.images, case.label) == (
        "c0",
        "c0",
        ("imagesTr/c0.nii.gz",),
        "labelsTr/c0.nii.gz",
    )


def test_msd_with_many_channels_keeps_its_order_and_its_one_file(tmp_path):
    modality = {str(k): name for k, name in enumerate(["FLAIR", "T1w", "T1w", "CT", *"efghijk"])}
    shuffled = dict(sorted(modality.items(), reverse=True))
    found = index(write_msd(tmp_path, modality=shuffled), modalities={"T1w_2": "other"})
    assert [c.name for c in found.channels] == ["FLAIR", "T1w_1", "T1w_2", "CT", *"efghijk"]
    assert [c.modality for c in found.channels][:4] == ["MRI", "MRI", "other", "CT"]
    assert all(len(case.images) == 1 for case in found.cases)


def test_what_the_user_says_comes_before_what_the_data_set_says(tmp_path):
    found = index(write_msd(tmp_path), name="Mine", licence="my own", reference="me", modalities={"MRI": "CT"})
    assert (found.name, found.licence, found.reference, found.channels[0].modality) == ("Mine", "my own", "me", "CT")
    with pytest.raises(ConfigError, match=r"download\.modalities(.|\n)*MRT(.|\n)*channels: MRI"):
        index(tmp_path, modalities={"MRT": "MRI"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": {"0": "background"}}, "'labels' are impossible"),
        ({"labels": {"background": 0, "both": [1, 2]}}, "several values"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "'labels' are impossible"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "twice"),
        ({"labels": {"background": 0, "a": 1.5}}, "whole numbers"),
        ({"labels": {"background": 0, "a": 300}}, "0 to 255"),
        ({"labels": {"background": 0, "a": True}}, "whole numbers"),
        ({"training": []}, "training"),
        ({"training": [{"image": "x"}]}, "training"),
        ({"training": ["imagesTr/c0.nii.gz"]}, "training"),
        ({"training": [{"image": "../x.nii", "label": "y.nii"}]}, "outside"),
        ({"training": [{"image": "/x.nii", "label": "y.nii"}]}, "outside"),
        ({"modality": None}, "modality"),
        ({"modality": {"first": "MRI"}}, "number the channels"),
        ({"modality": {"1": "MRI"}}, "number the channels"),
    ],
)
def test_broken_descriptions_are_named(tmp_path, change, words):
    with pytest.raises(DataError, match=words) as caught:
        index(write_msd(tmp_path, **change))
    assert caught.value.where == str(tmp_path / "dataset.json")


@pytest.mark.parametrize("text", ["{", "[1]", "", "\udcff"])
def test_a_description_that_is_no_json_object(tmp_path, text):
    write_msd(tmp_path)
    (tmp_path / "dataset.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"dataset\.json"):
        index(tmp_path)


def test_all_missing_files_are_counted_and_the_first_named(tmp_path):
    write_msd(tmp_path, 15)
    for k in range(12):
        (tmp_path / f"labelsTr/c{k}.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        index(tmp_path)
    message = str(caught.value)
    assert "12 file(s)" in message
    assert "labelsTr/c9.nii.gz and 2 more" in message
    assert "c10" not in message
    assert "hint" in message


def test_case_ids_that_appear_twice(tmp_path):
    write_msd(tmp_path, training=[{"image": "imagesTr/c0.nii.gz", "label": "labelsTr/c0.nii.gz"}] * 2)
    with pytest.raises(DataError, match=r"case ids appear twice(.|\n)*c0"):
        index(tmp_path)


def test_nnunet(tmp_path):
    write_nnunet(tmp_path / "Dataset007_Two", ("p1_f0", "p1_f1", "p2_f0"))
    found = index(tmp_path, patient_pattern=r"(p\d+)_")
    assert (found.layout, found.name) == ("nnunet", "Two")
    assert found.cases[1].images == (
        "Dataset007_Two/imagesTr/p1_f1_0000.nii.gz",
        "Dataset007_Two/imagesTr/p1_f1_0001.nii.gz",
    )
    assert [c.patient for c in found.cases] == ["p1", "p1", "p2"]


@pytest.mark.parametrize("lost", ["imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz", "labelsTr/b.nii.gz"])
def test_nnunet_case_that_lacks_a_file_is_not_just_left_out(tmp_path, lost):
    (write_nnunet(tmp_path) / lost).unlink()
    with pytest.raises(DataError, match=rf"1 file\(s\)(.|\n)*{lost}"):
        index(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"numTraining": 3}, r"numTraining(.|\n)*3, and 2"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "region"),
        ({"file_ending": ".png"}, "only NIfTI"),
        ({"channel_names": {}}, "channel_names"),
        ({"channel_names": {"0": "T1", "1": "T2", "2": "PD"}}, r"2 file\(s\)(.|\n)*a_0002"),
    ],
)
def test_nnunet_descriptions_that_do_not_fit(tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        index(write_nnunet(tmp_path, **change))


def test_a_description_of_another_format_is_told_by_name(tmp_path):
    for write, layout, other in ((write_nnunet, "msd", "nnunet"), (write_msd, "nnunet", "msd")):
        with pytest.raises(DataError, match=rf"a description of the layout {layout}(.|\n)*layout: {other}, or auto"):
            index(write(tmp_path / layout), layout=layout)
        assert index(tmp_path / layout).layout == other


@pytest.mark.parametrize("listed", [False, True])
def test_nnunets_first_version_says_what_to_rename(tmp_path, listed):
    root = write_nnunet(tmp_path)
    description = json.loads((root / "dataset.json").read_text())
    names = description.pop("channel_names")
    labels = {str(value): name for name, value in description.pop("labels").items()}
    training = [{"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in "ab"]
    old = description | {"labels": labels} | ({"training": training} if listed else {})
    (root / "dataset.json").write_text(json.dumps(old | {"modality": names}))
    for layout in ("auto", "msd", "nnunet"):
        with pytest.raises(DataError, match=r"nnU-Net's first version(.|\n)*rename 'modality' to 'channel_names'"):
            index(root, layout=layout)
    (root / "dataset.json").write_text(json.dumps(old | {"channel_names": names}))
    found = index(root)
    assert (found.layout, len(found.cases), found.labels) == ("nnunet", 2, PEEKED)


def test_nnunet_without_cases(tmp_path):
    with pytest.raises(DataError, match="no labelled case"):
        index(write_nnunet(tmp_path, ()))


def test_an_id_that_the_patient_pattern_does_not_match(tmp_path):
    write_nnunet(tmp_path, ("p1_f0", "q2"))
    for pattern in (r"(p\d)", r"p\d|q(x*)"):
        with pytest.raises(DataError, match=r"patient_pattern(.|\n)*(q2|p1_f0)"):
            index(tmp_path, patient_pattern=pattern)


def test_brats(tmp_path):
    write_brats(tmp_path / "MICCAI_BraTS2020_TrainingData", "B_001", "B_002", suffix=".nii.gz")
    found = index(tmp_path)
    assert found.layout == "brats2020"
    top = "MICCAI_BraTS2020_TrainingData/B_001/B_001"
    assert found.cases[0].images == tuple(f"{top}_{c}.nii.gz" for c in ("flair", "t1", "t1ce", "t2"))
    assert found.cases[0].label == f"{top}_seg.nii.gz"
    assert found.class_values == (0, 1, 2, 4)
    assert found.class_names == ("background", "necrotic_core", "oedema", "enhancing_tumour")


def test_brats_beside_validation_data_with_tables_and_litter(tmp_path):
    training = write_brats(tmp_path / "MICCAI_BraTS2020_TrainingData", "B_001")
    touch(training, "name_mapping.csv", "B_001/._B_001_seg.nii", "._B_001_seg.nii")
    touch(tmp_path, "MICCAI_BraTS2020_ValidationData/V_001/V_001_flair.nii")
    assert [c.id for c in index(tmp_path).cases] == ["B_001"]
    assert [c.id for c in index(tmp_path, layout="brats2020").cases] == ["B_001"]


def test_a_single_brats_case_is_not_taken_for_a_wrapper(tmp_path):
    assert [c.id for c in index(write_brats(tmp_path, "B_001")).cases] == ["B_001"]


def test_the_brats_case_whose_label_kept_its_makers_name(tmp_path):
    write_brats(tmp_path, "B_354", "B_355")
    (tmp_path / "B_355/B_355_seg.nii").rename(tmp_path / "B_355/W39_1998.09.19_Segm.nii")
    assert index(tmp_path).cases[1].label == "B_355/W39_1998.09.19_Segm.nii"


@pytest.mark.parametrize("kind", ["seg", "flair", "t1ce"])
def test_a_brats_case_that_lacks_a_file(tmp_path, kind):
    write_brats(tmp_path, "B_001", "B_002")
    (tmp_path / f"B_002/B_002_{kind}.nii").unlink()
    with pytest.raises(DataError, match=rf"1 file\(s\)(.|\n)*B_002_{kind}"):
        index(tmp_path)


def test_masks_called_seg_are_no_brats(tmp_path):
    touch(tmp_path, "scans/p0_0.nii.gz", "scans/p0_1.nii.gz", "masks/p0_0_seg.nii.gz", "masks/p0_1_seg.nii.gz")
    with pytest.raises(DataError, match=r"layout is not recognised(.|\n)*_t1ce(.|\n)*download\.layout: pattern"):
        index(tmp_path)


def pattern_of(image: str, label: str) -> PatternConfig:
    return PatternConfig(images=(image,), label=label, channels={"Flair": "MRI"}, labels=PEEKED)


def by_pattern(root: Path, image: str, label: str) -> list[tuple[str, tuple[str, ...], str]]:
    found = index(root, layout="pattern", pattern=pattern_of(image, label))
    return [(c.id, c.images, c.label) for c in found.cases]


def test_pattern_layout(tmp_path, capsys):
    for case in ("train/a1", "train/b2", "test/c3"):
        touch(tmp_path, f"{case}/Flair.nii.gz", f"{case}/seg.nii.gz", f"{case}/._seg.nii.gz")
    touch(tmp_path, "test/unlabelled/Flair.nii.gz")
    assert by_pattern(tmp_path, "*/{case}/Flair.nii.gz", "*/{case}/seg.nii.gz") == [
        ("a1", ("train/a1/Flair.nii.gz",), "train/a1/seg.nii.gz"),
        ("b2", ("train/b2/Flair.nii.gz",), "train/b2/seg.nii.gz"),
        ("c3", ("test/c3/Flair.nii.gz",), "test/c3/seg.nii.gz"),
    ]
    assert (
        "1 scans have no file that matches */{case}/seg.nii.gz and are left out: unlabelled" in capsys.readouterr().err
    )
    (tmp_path / "test/c3/Flair.nii.gz").unlink()
    touch(tmp_path, "other/a1/Flair.nii.gz")
    with pytest.raises(DataError) as caught:
        by_pattern(tmp_path, "*/{case}/Flair.nii.gz", "*/{case}/seg.nii.gz")
    assert "case c3: 0 files match */c3/Flair.nii.gz" in str(caught.value)
    assert "case a1: 2 files match */a1/Flair.nii.gz" in str(caught.value)
    touch(tmp_path, "other/b2/seg.nii.gz")
    with pytest.raises(DataError, match="case b2: 2 files match \\*/b2/seg"):
        by_pattern(tmp_path, "*/{case}/Flair.nii.gz", "*/{case}/seg.nii.gz")


def test_masks_that_look_like_scans_are_no_scans_without_a_mask(tmp_path, capsys):
    touch(tmp_path, "all/a.nii", "all/a_seg.nii")
    assert by_pattern(tmp_path, "all/{case}.nii", "all/{case}_seg.nii") == [("a", ("all/a.nii",), "all/a_seg.nii")]
    assert not capsys.readouterr().err


def test_patterns_are_relative_to_the_root_or_to_what_it_wraps(tmp_path):
    touch(tmp_path, "set/train/a1/x.nii", "set/train/a1/y.nii")
    wrapped = [("a1", ("set/train/a1/x.nii",), "set/train/a1/y.nii")]
    for start in ("set/train/", "train/", "*/", "**/", "./set/*/"):
        assert by_pattern(tmp_path, start + "{case}/x.nii", start + "{case}/y.nii") == wrapped


def test_case_ids_with_special_characters_and_linked_folders(tmp_path):
    touch(tmp_path / "elsewhere", "x.nii", "y.nii")
    touch(tmp_path / "set", "c[1] (b)/x.nii", "c[1] (b)/y.nii")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    found = by_pattern(tmp_path / "set", "{case}/x.nii", "{case}/y.nii")
    assert [case for case, _, _ in found] == ["c[1] (b)", "linked"]


def test_a_label_pattern_that_matches_nothing(tmp_path):
    touch(tmp_path, "a/x.nii")
    with pytest.raises(DataError, match=r"no file matches the label pattern(.|\n)*x.nii"):
        by_pattern(tmp_path, "{case}/x.nii", "{case}/z.nii")


@settings(deadline=None, max_examples=100)
@given(case=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1))
def test_any_case_id_comes_back_from_its_file_name(case):
    assert matches("*/{case}/{case}_seg.nii.gz", [f"train/{case}/{case}_seg.nii.gz"]) == {
        case: [f"train/{case}/{case}_seg.nii.gz"]
    }
    assert matches("*/{case}/{case}_seg.nii.gz", [f"train/{case}/{case}x_seg.nii.gz"]) == {}


@settings(deadline=None, max_examples=100)
@given(
    names=st.lists(st.text("abc xyz", min_size=1).filter(lambda n: n not in ("background", "ignore")), min_size=1,
                   max_size=9, unique=True)
)  # fmt: skip
def test_both_ways_to_write_labels_mean_the_same(names):
    wanted = {"background": 0} | {name: k for k, name in enumerate(names, 1)}
    assert labels_of(wanted, Path()) == wanted
    assert labels_of({str(v): k for k, v in wanted.items()}, Path()) == wanted
    assert labels_of({k: str(v) for k, v in wanted.items()}, Path()) == wanted
    assert labels_of({k: v for k, v in wanted.items() if v}, Path()) == wanted
    assert labels_of({"nothing": 0} | {k: v for k, v in wanted.items() if v}, Path()) == wanted


def test_the_ignore_label_of_nnunet_is_no_class_and_its_value_is_kept(tmp_path):
    assert labels_of({"background": 0, "x": 1, "ignore": 2}, Path()) == PEEKED
    assert ignored_of(PEEKED, Path()) is None
    found = index(write_nnunet(tmp_path / "plain", labels=PEEKED | {"ignore": 2}))
    assert (found.labels, found.ignored_value) == (PEEKED, 2)
    regions = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    found = index(write_nnunet(tmp_path / "regions", labels=regions, regions_class_order=[1, 2]))
    assert (found.labels, found.ignored_value) == ({"background": 0, "label_1": 1, "core": 2}, 3)
    with pytest.raises(DataError, match="impossible"):
        labels_of(PEEKED | {"ignore": 1}, Path())


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("MRI", "MRI"), ("cineMRI", "MRI"), ("CT", "CT"), ("T2", "MRI"), ("ADC", "MRI"), ("FLAIR", "MRI"),
        ("T1gd", "MRI"), ("FDG-PET", "PET"), ("ultrasound", "US"), ("contrast CT", "CT"), ("noNorm", "other"),
    ],
)  # fmt: skip
def test_modality_from_a_channels_name(name, modality):
    assert modality_of(name) == modality


def test_unrecognised_folders(tmp_path):
    with pytest.raises(DataError, match=r"layout is not recognised(.|\n)*layout: pattern"):
        index(tmp_path)
    with pytest.raises(DataError, match="no labelled case"):
        index(tmp_path, layout="brats2020")
    with pytest.raises(DataError, match=r"dataset\.json"):
        index(tmp_path, layout="msd")


def test_the_name_of_a_data_set_without_one(tmp_path):
    write_msd(tmp_path, name=None)
    found = index_dataset(tmp_path, DownloadConfig(), source="https://host/a/Dataset009_Liver.tar.gz")
    assert found.name == "Liver"


def test_the_index_survives_its_file_and_case_images_read(tmp_path):
    case = write_case(tmp_path, "c")
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1, "b": 2}, "numTraining": 1})
    )
    found = index(tmp_path)
    found.save(tmp_path)
    again = DatasetIndex.load(tmp_path)
    assert again == found
    assert again.cases == (case,)
    assert np.asarray(nib.load(tmp_path / again.cases[0].label).dataobj).max() == 2
