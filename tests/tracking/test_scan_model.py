"""The registered model as its users load it: arrays to logits, paths to masks, nothing pickled, no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import yaml

import distilldsm
from distilldsm.core.errors import UserError
from distilldsm.core.files import read_json
from distilldsm.inference.engines import OnnxEngine, OpenVINOEngine
from distilldsm.inference.loading import load_exported
from distilldsm.inference.service import OUTPUT_VARIABLE, ROOT_VARIABLE, answer
from distilldsm.io import read_scan
from distilldsm.models.package import verify
from distilldsm.tracking import describe, flavor
from tests.export.fake import NETWORK, Exported, exported
from tests.tracking.store import CONFIG, publish_known, the_run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory)


@pytest.fixture(scope="module")
def scan(made) -> list[str]:
    """The files of one scan, one per channel."""
    case = read_json(made.raw / "dataset_index.json")["cases"][0]
    return [str(made.raw / name) for name in case["images"]]


@pytest.fixture
def loaded(place, client, made):
    """What `models:/NAME@challenger` loads."""
    import mlflow

    export = Path(shutil.copytree(made.export, place / "export/fold1"))
    describe(CONFIG, export, name="n", model={"registered_name": "scans", "metadata": {"fold": 1}})
    publish_known()
    mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")
    try:
        yield mlflow.pyfunc.load_model("models:/scans@challenger", dst_path=str(_made(place / "fetched")))
    finally:
        mlflow.set_tracking_uri(None)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_arrays_paths_and_what_the_model_is(loaded, client, made, scan, place):
    signature = loaded.metadata.signature
    assert signature.inputs.inputs[0].shape == (1, 2, -1, -1, -1)
    assert (signature.inputs.inputs[0].name, str(signature.inputs.inputs[0].type)) == ("image", "float32")
    assert signature.outputs.inputs[0].shape == (1, 3, -1, -1, -1)
    assert [p.name for p in signature.params] == ["paths", "output"]
    assert loaded.metadata.metadata == {"fold": 1}
    version = client.get_model_version_by_alias("scans", "challenger")
    assert loaded.metadata.run_id == version.run_id == the_run(client).info.run_id

    image = np.random.default_rng(0).normal(size=(1, 2, 3, 16, 32)).astype(np.float32)
    logits = loaded.predict({"image": image})["logits"]
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, OpenVINOEngine(made.export / "model.xml", NETWORK)(image))
    # As the ONNX model answers, but for weights in half precision.
    np.testing.assert_allclose(logits, OnnxEngine(made.export / "model.onnx", NETWORK)(image), atol=5e-3)
    np.testing.assert_array_equal(loaded.predict(image)["logits"], logits)
    with pytest.raises(Exception, match="does not match expected shape"):
        loaded.predict({"image": image[:, :1]})
    with pytest.raises(Exception, match="dtype"):
        loaded.predict({"image": image.astype(np.float64)})

    expected = load_exported(made.export).predict(read_scan([Path(p) for p in scan], 2)).mask
    assert expected.any()
    nothing = {"image": np.empty((1, 2, 0, 0, 0), np.float32)}
    mask = loaded.predict(nothing, params={"paths": scan})["mask"]
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(loaded.predict({"image": np.array(scan, dtype=object)})["mask"], expected)
    registered = distilldsm.load_model("models:/scans@challenger")
    np.testing.assert_array_equal(registered.predict(scan).mask, expected)
    with pytest.raises(UserError, match="cannot be loaded from MLflow"):
        distilldsm.load_model("models:/nobody@challenger")
    target = place / "mask.nii.gz"
    assert loaded.predict(nothing, params={"paths": scan, "output": str(target)}) == {"output": str(target)}
    written = nib.load(target)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), expected)
    np.testing.assert_allclose(written.affine, nib.load(scan[0]).affine, atol=1e-5)
    with pytest.raises(UserError, match="neither an image nor paths"):
        loaded.predict(nothing)

    [folder] = [path.parent for path in (place / "fetched").rglob("MLmodel")]
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["model_code_path"].endswith("scan_model.py")
    assert "python_model" not in described["flavors"]["python_function"]
    assert not [path.name for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle")]
    verify(folder)  # downloaded, it is a model directory again
    pinned = (folder / "requirements.txt").read_text().split()
    assert all("==" in line for line in pinned)
    assert {line.partition("==")[0] for line in pinned} == {"mlflow", *flavor.PACKAGES}


LOADER = """
import sys
import mlflow.pyfunc
import numpy as np

model = mlflow.pyfunc.load_model(sys.argv[1])
mask = model.predict({"image": np.array(sys.argv[2:], dtype=object)})["mask"]
import distilldsm
assert "torch" not in sys.modules and "onnxruntime" not in sys.modules
print(distilldsm.__file__, mask.shape)
"""


@pytest.mark.slow
def test_it_loads_where_this_package_is_not_installed(loaded, scan, place):
    """Its own code comes with it."""
    [folder] = [path.parent for path in (place / "fetched").rglob("MLmodel")]
    # Isolated, with the packages' folder but without the editable installation's finder.
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"import sys; sys.path.append({packages!r})\n{LOADER}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(folder), *scan], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(str(folder / "code" / "distilldsm"))


@pytest.fixture
def predictor():
    """Answers with the number of channels."""
    return SimpleNamespace(
        plan=SimpleNamespace(
            channels=(SimpleNamespace(name="t1"), SimpleNamespace(name="t2")),
            axis_order=(0, 1, 2),
            target_spacing_mm=(1.0, 1.0, 1.0),
        ),
        logits=lambda image: image,
        predict=lambda scan: SimpleNamespace(mask=np.ones(scan.shape, np.uint8)),
    )


def test_a_server_sees_its_folder_only(predictor, scan, tmp_path, monkeypatch):
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    params = {"paths": scan}
    assert answer(predictor, None, params, remote=False)["mask"].all()
    with pytest.raises(UserError, match="does not accept paths"):
        answer(predictor, None, params, remote=True)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    for remote in (True, False):
        with pytest.raises(UserError, match="lies outside"):
            answer(predictor, None, params, remote=remote)
    (tmp_path / "link").symlink_to(Path(scan[0]).parent)
    with pytest.raises(UserError, match="lies outside"):
        answer(predictor, None, {"paths": [f"link/{Path(path).name}" for path in scan]}, remote=True)
    monkeypatch.setenv(ROOT_VARIABLE, str(Path(scan[0]).parent))
    names = [Path(path).name for path in scan]
    assert answer(predictor, np.array(names, dtype=object), remote=True)["mask"].all()
    with pytest.raises(UserError, match="lies outside"):
        answer(predictor, None, {"paths": names, "output": "../mask.nii.gz"}, remote=True)
    monkeypatch.setenv(OUTPUT_VARIABLE, str(tmp_path))
    (tmp_path / "out").symlink_to(Path(scan[0]).parent)
    for output in (f"{Path(scan[0]).parent}/mask.nii.gz", "out/mask.nii.gz"):
        with pytest.raises(UserError, match=f"lies outside(.|\n)*{OUTPUT_VARIABLE}"):
            answer(predictor, None, {"paths": names, "output": output}, remote=True)
    assert answer(predictor, None, {"paths": names, "output": "m.nii"}, remote=True) == {"output": f"{tmp_path}/m.nii"}
    before = (tmp_path / "m.nii").read_bytes()
    with pytest.raises(UserError, match="exists"):
        answer(predictor, None, {"paths": names, "output": "m.nii"}, remote=True)
    assert (tmp_path / "m.nii").read_bytes() == before
    predictor.predict = lambda scan: scan.no_such_thing
    with pytest.raises(AttributeError):
        answer(predictor, None, {"paths": names, "output": "other.nii"}, remote=True)
    assert not (tmp_path / "other.nii").exists()
    with pytest.raises(UserError, match="is not a path"):
        answer(predictor, None, {"paths": ["a\0"]}, remote=True)


def test_outputs_that_cannot_be(predictor, scan, tmp_path, monkeypatch):
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    for output, words in (
        (scan[0], "exists"),
        (str(tmp_path / "mask.png"), "cannot be written"),
        (str(tmp_path / "none" / "mask.nii.gz"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=words):
            answer(predictor, None, {"paths": scan, "output": output}, remote=False)
    with pytest.raises(UserError, match="neither an image"):
        answer(predictor, np.zeros((2, 3, 4), np.float32), remote=False)
    image = np.zeros((1, 2, 1, 2, 2))
    for unfit in (image[:, :1], image.astype(complex)):
        with pytest.raises(UserError, match="neither an image"):
            answer(predictor, unfit, remote=False)
    for value in (np.nan, np.inf):
        image[0, 1, 0, 1, 0] = value
        with pytest.raises(UserError, match="NaN or infinite"):
            answer(predictor, {"image": image}, remote=False)
