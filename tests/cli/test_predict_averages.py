"""`distilldsm predict` with mirrored views, several models and post-processing, and what of that it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from distilldsm.cli.main import main
from distilldsm.core.files import read_json, sha256_file, write_json
from distilldsm.inference.loading import load_exported
from distilldsm.inference.postprocess import keep_largest
from distilldsm.io import read_scan
from tests.cli.test_predict import write_scan
from tests.export.fake import exported


def changed(source: Path, target: Path, *, plan: dict | None = None, network: dict | None = None, **metadata) -> Path:
    """A copy of an exported model that says something else in its plan or metadata."""
    shutil.copytree(source, target)
    (target / "manifest.json").unlink(missing_ok=True)
    write_json(target / "plan.json", read_json(target / "plan.json") | (plan or {}))
    content = read_json(target / "metadata.json") | metadata
    content["network"] |= network or {}
    content["files"] = {name: sha256_file(target / name) for name in content["files"]}
    write_json(target / "metadata.json", content)
    return target


@pytest.fixture(scope="module")
def folds(tmp_path_factory) -> tuple[Path, Path]:
    """Two models of one task with other weights, trained with flips, and their decisions on post-processing."""
    import onnx

    from distilldsm.export.openvino_export import export_openvino

    root = tmp_path_factory.mktemp("folds")
    made = exported(tmp_path_factory).export
    network = {"mirror_axes": ["depth", "width"]}
    first = changed(made, root / "fold0", network=network, postprocessing=["shell", "core"])
    other = changed(made, root / "raw", network=network | {"mirror_axes": ["height"]}, postprocessing=["core"])
    model = onnx.load(other / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.startswith("head."):
            values = onnx.numpy_helper.to_array(tensor)
            noise = np.random.default_rng(0).normal(0, values.std(), values.shape).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values + noise, tensor.name))
    onnx.save(model, other / "model.onnx")
    export_openvino(other / "model.onnx", other / "model.xml", fp16=False)
    return first, changed(other, root / "fold1")


@pytest.fixture
def predicted(tmp_path, capsys) -> Callable[..., tuple[np.ndarray, dict, str]]:
    """Runs the command: the mask, the report, stderr."""

    def run(model: Path, scan: list[Path], *options: object) -> tuple[np.ndarray, dict, str]:
        out = tmp_path / "mask.nii"
        assert main(["predict", str(model), *map(str, scan), "-o", str(out), "--json", *map(str, options)]) == 0
        captured = capsys.readouterr()
        return np.asarray(nib.load(out).dataobj).copy(), json.loads(captured.out), captured.err

    return run


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_all_at_once_in_pieces_and_in_memory(folds, predicted, tmp_path, engine):
    first, second = folds
    scan = write_scan(tmp_path, ("a.nii", "b.nii"), shape=(300, 60, 20))
    options = ("--engine", engine, "--ensemble", second, "--mirror", "trained", "--postprocess")
    whole, report, _ = predicted(first, scan, *options)
    assert (report["ensemble"], report["keep_largest"]) == ([str(second)], ["core"])
    assert report["mirror"] == [["depth", "width"], ["height"]]
    assert report["scans"][0]["pieces"] == 1
    less = report["scans"][0]["estimated_memory_mb"] / 1000 * 0.96
    pieces, small, _ = predicted(first, scan, *options, "--max-memory", less)
    assert small["scans"][0]["pieces"] > 1
    assert small["scans"][0]["exact"]
    np.testing.assert_array_equal(pieces, whole)

    predictor = load_exported(first, runtime=engine, ensemble=[second], mirror="trained", postprocess=True)
    stored = read_scan(scan, 2)
    np.testing.assert_array_equal(predictor.predict(stored).mask, whole)
    assert len(np.unique(whole)) > 1
    voxel_ml = report["scans"][0]["volume_ml"]["core"] / (whole == 2).sum()
    assert report["scans"][0]["volume_ml"]["shell"] == pytest.approx(voxel_ml * (whole == 1).sum(), rel=1e-2, abs=1e-3)

    # Each of them matters, or the comparison would be of nothing.
    raw = load_exported(first, runtime=engine, ensemble=[second], mirror="trained").predict(stored).mask
    assert keep_largest(raw, [2])
    np.testing.assert_array_equal(raw, whole)
    for less in ({"mirror": "trained"}, {"ensemble": [second]}):
        assert (load_exported(first, runtime=engine, postprocess=True, **less).predict(stored).mask != whole).any()


def test_a_model_with_itself_is_the_model(folds, predicted, tmp_path):
    scan = write_scan(tmp_path, ("a.nii", "b.nii"))
    alone, report, _ = predicted(folds[0], scan)
    assert (report["ensemble"], report["mirror"], report["keep_largest"]) == ([], [[]], [])
    twice, _, _ = predicted(folds[0], scan, "--ensemble", folds[0], "--probabilities")
    np.testing.assert_array_equal(twice, alone)
    maps = np.asarray(nib.load(tmp_path / "mask_probabilities.nii.gz").dataobj.get_unscaled())
    predicted(folds[0], scan, "--probabilities")
    np.testing.assert_array_equal(maps, nib.load(tmp_path / "mask_probabilities.nii.gz").dataobj.get_unscaled())


def test_axes_given_by_hand_are_taken_and_remarked_on(folds, predicted, tmp_path):
    scan = write_scan(tmp_path, ("a.nii", "b.nii"))
    trained, _, remarks = predicted(folds[0], scan, "--mirror", "trained")
    assert "was not trained with" not in remarks
    named, report, remarks = predicted(folds[0], scan, "--mirror", "width,depth")
    np.testing.assert_array_equal(named, trained)
    assert report["mirror"] == [["depth", "width"]]
    _, _, remarks = predicted(folds[0], scan, "--mirror", "height")
    assert f"{folds[0]}: was not trained with flips along height" in remarks


def test_what_does_not_fit_together_is_refused(folds, tmp_path, tmp_path_factory, capsys):
    scan = write_scan(tmp_path, ("a.nii", "b.nii"))
    made = exported(tmp_path_factory).export
    plan = read_json(made / "plan.json")

    def refused(model: Path, *options: object) -> str:
        arguments = ["predict", model, *scan, "-o", tmp_path / "no.nii", *options]
        code = main([str(argument) for argument in arguments])
        assert code in (1, 2)
        assert not (tmp_path / "no.nii").exists()
        return f"{code} {capsys.readouterr().err}"

    channel = {"name": "CT", "modality": "CT"}
    rule = {**plan["normalisation"][0], "scheme": "none"}
    for k, (name, change) in enumerate(
        {
            "set of labels": {"plan": {"class_values": [0, 2, 1]}},
            "set of channels": {"plan": {"channels": [channel, plan["channels"][1]]}},
            "depth axis": {"plan": {"depth_axis": "x" if plan["depth_axis"] != "x" else "y"}},
            "spacing in mm": {"plan": {"target_spacing_mm": [9.0, 1.0, 1.0]}},
            "normalisation": {"plan": {"normalisation": [rule, plan["normalisation"][1]]}},
            "crop to non-zero": {"plan": {"crop_to_nonzero": not plan["crop_to_nonzero"]}},
            "resampling": {"plan": {"coarse_slices": not plan["coarse_slices"]}},
            "stride of the network": {"network": {"stride": [16, 16, 16]}},
        }.items()
    ):
        other = changed(made, tmp_path / f"other{k}", **change)
        told = refused(made, "--ensemble", made, "--ensemble", other)
        assert told.startswith(f"1 error: {other}: does not fit into the ensemble: it has another {name}"), told
        assert f", as {made}" in told
    assert "9.0, 1.0, 1.0" in refused(made, "--ensemble", tmp_path / "other3")

    told = refused(made, "--mirror", "trained")
    assert told.startswith(f"1 error: {made}: was not trained with mirroring")
    assert "--mirror height,width" in told
    assert f"{made}: was not trained with mirroring" in refused(folds[0], "--mirror", "trained", "--ensemble", made)
    assert refused(made, "--mirror", "up").startswith("2 error: --mirror: does not name axes")
    assert f"{made}: has no decision" in refused(made, "--postprocess")
    assert f"{made}: has no decision" in refused(folds[0], "--postprocess", "--ensemble", made)
    assert "is not an exported model" in refused(made, "--ensemble", tmp_path / "nowhere")


def test_no_label_gained(folds, predicted, tmp_path):
    model = changed(folds[0], tmp_path / "model", postprocessing=[])
    scan = write_scan(tmp_path, ("a.nii", "b.nii"))
    plain, _, _ = predicted(model, scan)
    same, report, remarks = predicted(model, scan, "--postprocess")
    np.testing.assert_array_equal(same, plain)
    assert report["keep_largest"] == []
    assert "--postprocess changes nothing" in remarks


NESTED = [("whole", (2, 1, 4)), ("core", (1, 4)), ("inner", (4,))]
CROSSED = [("a", (2, 1)), ("b", (1, 4)), ("c", (4,))]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return exported(tmp_path_factory).export


def of_regions(made: Path, target: Path, regions: list, **metadata) -> Path:
    """The model with its three channels taken for regions of three labels."""
    labels = {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 4}
    described = [{"name": name, "values": values, "written_as": values[0]} for name, values in regions]
    plan = {"class_names": list(labels), "class_values": list(labels.values()), "regions": described}
    return changed(made, target, plan=plan, labels=labels, regions=described, **metadata)


@pytest.mark.parametrize("more", [(), ("--ensemble",), ("--max-memory",)])
def test_of_nested_regions_the_outermost_keeps_its_largest_component(made, predicted, tmp_path, more):
    model = of_regions(made, tmp_path / "model", NESTED, postprocessing=["whole"])
    scan = write_scan(tmp_path, ("a.nii", "b.nii"), shape=(300, 60, 20))
    options = [("--ensemble", model)] if more == ("--ensemble",) else []
    raw, report, _ = predicted(model, scan, *(part for pair in options for part in pair), "--probabilities")
    maps = np.asarray(nib.load(tmp_path / "mask_probabilities.nii.gz").dataobj.get_unscaled()).copy()
    if more == ("--max-memory",):
        options = [(*more, report["scans"][0]["estimated_memory_mb"] / 1000 * 0.96)]
    given = [part for pair in options for part in pair]
    found, report, _ = predicted(model, scan, *given, "--postprocess", "--probabilities")
    assert report["keep_largest"] == ["whole"]
    assert (report["scans"][0]["pieces"] > 1) == (more == ("--max-memory",))
    components, count = ndimage.label(raw, np.ones((3, 3, 3)))
    largest = components == 1 + np.bincount(components.ravel())[1:].argmax()
    assert count > 1
    assert len(np.unique(raw[(components > 0) & ~largest])) > 1, "labels of several regions are cut off"
    np.testing.assert_array_equal(found, np.where(largest, raw, 0))
    # Volumes are those of the mask; probabilities are as before.
    voxel_ml = abs(np.linalg.det(nib.load(scan[0]).affine[:3, :3])) / 1000
    for name, value in (("necrosis", 1), ("oedema", 2), ("enhancing", 4)):
        assert report["scans"][0]["volume_ml"][name] == pytest.approx(voxel_ml * (found == value).sum(), abs=1e-3)
    np.testing.assert_array_equal(maps, nib.load(tmp_path / "mask_probabilities.nii.gz").dataobj.get_unscaled())
    predictor = load_exported(model, postprocess=True)
    np.testing.assert_array_equal(predictor.predict(read_scan(scan, 2)).mask, found)


def test_what_was_not_tried_is_told_so(made, predicted, tmp_path):
    scan = write_scan(tmp_path, ("a.nii", "b.nii"))
    _, _, remarks = predicted(of_regions(made, tmp_path / "x", CROSSED, postprocessing=[]), scan, "--postprocess")
    assert "--postprocess changes nothing: not tried, as regions overlap" in remarks
    _, _, remarks = predicted(of_regions(made, tmp_path / "n", NESTED, postprocessing=[]), scan, "--postprocess")
    assert "--postprocess changes nothing: it brought no improvement" in remarks


def test_info_tells_of_both(folds, tmp_path_factory, capsys):
    assert main(["info", str(folds[0])]) == 0
    text = capsys.readouterr().out
    assert "depth, width" in text
    assert "postprocess largest component of shell, core" in text
    assert main(["info", str(exported(tmp_path_factory).export)]) == 0
    text = capsys.readouterr().out
    assert "none in training" in text
    assert "not decided" in text
