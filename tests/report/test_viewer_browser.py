"""The viewer in a browser: what a click, a key and a control do to the pixels and to the read-out.

The same from file:// and in a frame as MLflow shows HTML artifacts in: a blob: address, sandboxed to scripts only.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from distilldsm.report.figures import COLOURS
from distilldsm.report.viewer import ViewedCase, packed, viewer_page
from tests.report import volumes

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the optional group 'dev'")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the system package chromium")

SHELL, CORE = (tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5)) for colour in COLOURS[1:3])
WHERE = ("file", "sandbox")
IN_A_FILE = pytest.mark.parametrize("opened", ["file"], indirect=True)  # what no sandbox can change is asked once
FRAME = """html => {
    const frame = document.createElement("iframe");
    frame.setAttribute("sandbox", "allow-scripts");
    frame.style = "border:0;width:100%;height:600px";
    frame.src = URL.createObjectURL(new Blob([html], {type: "text/html"}));
    document.body.append(frame);
}"""


def small(volume: np.ndarray, is_label: bool = True) -> bytes:
    return packed(volume, volumes.AFFINE, is_label=is_label, max_voxels=10**6)


@pytest.fixture(scope="module")
def html() -> str:
    image = small(volumes.image(), is_label=False)
    cases = [
        ViewedCase(name="both", caption="two labels", image=image, truth=small(volumes.truth()),
                   prediction=small(volumes.prediction())),
        ViewedCase(name="dark, no masks", image=small(np.zeros(volumes.SHAPE), is_label=False)),
        ViewedCase(name="broken", image=b"no volume"),
    ]  # fmt: skip
    return viewer_page("Viewer <test>", cases, volumes.LABELS)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        )
        yield browser
        browser.close()


@dataclass
class Viewer:
    """A page that shows the first case: its frame, what it asked the network for, and the errors of its scripts."""

    frame: sync_api.Frame
    requests: list[str]
    errors: list[str]

    def control(self, name: str) -> sync_api.Locator:
        return self.frame.locator(f"[data-is={name}]")

    def shows(self, case: int) -> None:
        self.frame.wait_for_selector(f"#dsm-viewer[data-shown='{case}']", timeout=60_000)

    def pixels(self) -> np.ndarray:
        """(height, width, 3) of the slices, the crosshair included."""
        from PIL import Image

        # What was drawn last is on the screen a frame later.
        self.frame.evaluate("() => new Promise((next) => requestAnimationFrame(() => requestAnimationFrame(next)))")
        return np.asarray(Image.open(io.BytesIO(self.control("canvas").screenshot())).convert("RGB")).astype(int)

    def where(self, colour: tuple[int, ...]) -> np.ndarray:
        """(n, 2): row and column of the pixels of a colour."""
        return np.argwhere(np.abs(self.pixels() - colour).max(axis=2) <= 2)

    def read(self) -> str:
        return self.control("readout").inner_text()

    def position(self) -> np.ndarray:
        """x, y, z in mm, as the read-out says."""
        match = re.match(r"x (\S+) y (\S+) z (\S+) mm", self.read())
        assert match, self.read()
        return np.array([float(number) for number in match.groups()])

    def keys(self, control: str, *keys: str) -> None:
        for key in keys:
            self.control(control).press(key)


@pytest.fixture(scope="module", params=WHERE)
def opened(request, browser, html, tmp_path_factory) -> Iterator[Viewer]:
    """One page for all tests, as most of their time is the start of NiiVue."""
    # High enough for the slices: what is taller is put together from several parts.
    context = browser.new_context(viewport={"width": 620, "height": 700}, offline=True)
    page = context.new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda made: requests.append(made.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    path = tmp_path_factory.mktemp("viewer") / "page.html"
    if request.param == "file":
        path.write_text(html, encoding="utf-8")
        page.goto(path.as_uri())
        frame = page.main_frame
    else:
        path.write_text("<!doctype html><body></body>")
        page.goto(path.as_uri())
        page.evaluate(FRAME, html)
        frame = page.frames[1]
    yield Viewer(frame, requests, errors)
    context.close()


@pytest.fixture
def viewer(opened) -> Viewer:
    """The first case with the controls as they are at first, but for the planes: one is enough."""
    opened.shows(0)
    for name in ("truth", "prediction"):
        opened.control(name).check()
    opened.control("radiological").uncheck()
    opened.control("style").select_option("outline")
    opened.control("planes").select_option("axial")
    opened.keys("opacity", "End")
    opened.control("reset").click()
    opened.frame.get_by_role("button", name="shell").click()
    return opened


def test_it_asks_nobody_for_anything(viewer):
    """One page is all that is fetched: no font, no worker, no script."""
    fetched = [url for url in viewer.requests if not url.startswith(("data:", "blob:"))]
    assert len(fetched) == 1, fetched
    assert fetched[0].startswith("file:")
    assert viewer.errors == []
    assert viewer.control("message").inner_text() == ""


@IN_A_FILE
def test_controls_change_the_pixels(viewer):
    viewer.control("prediction").uncheck()
    truth, core = viewer.where(SHELL), viewer.where(CORE)
    assert min(len(truth), len(core)) > 400
    viewer.control("truth").uncheck()
    plain = viewer.pixels()
    assert np.ptp(plain[..., 0]) > 200  # the scan, of random grey
    viewer.control("prediction").check()
    outline = viewer.where(SHELL)
    assert 0 < len(outline) < len(truth) / 2
    assert len(viewer.where(CORE)) == 0  # the prediction has none
    viewer.control("style").select_option("area")
    area = viewer.where(SHELL)
    assert len(area) > len(truth)  # up to its border, where the overlay of the truth fades
    assert np.abs(area.mean(axis=0) - truth.mean(axis=0)).max() < 2  # each is drawn where the other is
    # Some of it lets some of the scan through, and none of it all.
    viewer.keys("opacity", *["PageDown"] * 5)
    share = viewer.control("opacity").evaluate("slider => slider.value / 100")
    assert 0.3 < share < 0.7
    mixed = viewer.pixels()
    changed = (mixed != plain).any(axis=2)
    assert changed.sum() >= 0.9 * len(area)
    expected = (1 - share) * plain + np.multiply(SHELL, share)
    assert (np.abs(mixed - expected)[changed].max(axis=1) < 3).mean() > 0.9  # all but the crosshair and the border
    viewer.keys("opacity", "Home")
    assert np.array_equal(viewer.pixels(), plain)


def test_a_click_moves_the_crosshair_and_tells_what_is_there(viewer):
    assert np.allclose(viewer.position(), volumes.centre_mm(volumes.SHELL), atol=0.06)
    assert "truth: shell · prediction: shell" in viewer.read()
    assert "differ" not in viewer.read()
    # The core is in the same axial plane: where it is drawn must be where it is.
    row, column = viewer.where(CORE).mean(axis=0)
    viewer.control("canvas").click(position={"x": column, "y": row})
    expected = volumes.centre_mm(volumes.CORE)
    assert np.abs(viewer.position() - expected).max() < 0.5, (viewer.position(), expected)
    assert "truth: core · prediction: background · they differ" in viewer.read()
    # A voxel to the patient's right (x grows), one to the back, two up, as the scanner sees it.
    before = viewer.position()
    viewer.keys("canvas", "ArrowRight", "ArrowDown", "PageUp", "PageUp")
    assert np.allclose(viewer.position() - before, [1.5, -2.0, 2.0], atol=1.6)
    index = np.linalg.solve(volumes.AFFINE[:3, :3], viewer.position() - volumes.AFFINE[:3, 3])
    value = volumes.image()[tuple(np.rint(index).astype(int))]
    assert re.search(r"intensity (\S+)", viewer.read())[1] == str(value)
    # As radiologists have it: mirrored on the screen, not in the numbers.
    viewer.control("radiological").check()
    viewer.frame.get_by_role("button", name="core").click()
    assert np.abs(viewer.position() - expected).max() < 0.8
    assert abs(viewer.where(CORE).mean(axis=0)[1] - column) > 40


@IN_A_FILE
def test_the_window(viewer):
    viewer.control("truth").uncheck()
    viewer.control("prediction").uncheck()
    before = viewer.pixels()
    low = float(viewer.control("low").input_value())
    viewer.control("low").fill("2000")
    viewer.control("high").fill("3000")
    viewer.control("high").press("Enter")
    assert (viewer.pixels().max(axis=2) < 40).mean() > 0.9  # all is below the window; lines and letters remain
    viewer.control("reset").click()
    assert float(viewer.control("low").input_value()) == low
    assert np.array_equal(viewer.pixels(), before)
    # By the mouse: to the right wider, down brighter levels are asked for and all gets darker.
    box = viewer.control("canvas").bounding_box()
    mouse = viewer.frame.page.mouse
    mouse.move(box["x"] + 60, box["y"] + 60)
    mouse.down(button="right")
    mouse.move(box["x"] + 160, box["y"] + 60, steps=3)
    assert np.allclose(window(viewer), [2 * low, -2 * low], rtol=0.1)
    mouse.move(box["x"] + 60, box["y"] + 160, steps=3)
    mouse.up(button="right")
    assert np.allclose(window(viewer), [low / 3, -low * 5 / 3], rtol=0.1)
    assert viewer.pixels().mean() < before.mean() - 20
    mouse.dblclick(box["x"] + 60, box["y"] + 60)
    assert window(viewer)[0] == low


def window(viewer: Viewer) -> list[float]:
    return [float(viewer.control(name).input_value()) for name in ("low", "high")]


def test_cases(viewer):
    assert viewer.control("caption").inner_text() == "two labels"
    grey = viewer.pixels()
    viewer.control("case").select_option("dark, no masks")
    viewer.shows(1)
    assert viewer.control("caption").inner_text() == ""
    assert viewer.control("truth").is_disabled()
    assert viewer.control("style").is_disabled()
    assert "truth" not in viewer.read()
    assert len(viewer.where(SHELL)) == 0
    assert viewer.pixels().mean() < grey.mean() / 3
    viewer.control("case").select_option("broken")
    viewer.control("message").filter(has_text="cannot be shown: its data are damaged").wait_for()
    # The way back is open, and nothing of the others is left.
    viewer.control("case").select_option("both")
    viewer.shows(0)
    assert viewer.control("message").inner_text() == ""
    viewer.frame.get_by_role("button", name="shell").click()
    # On a busy machine the graphics may be some frames behind.
    assert any(np.array_equal(viewer.pixels(), grey) for _ in range(20))


def test_without_webgl_it_says_so(browser, html, tmp_path):
    page = browser.new_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    (tmp_path / "page.html").write_text(html)
    page.goto((tmp_path / "page.html").as_uri())
    message = page.locator("[data-is=message]")
    message.filter(has_text="no WebGL 2").wait_for()
    assert page.locator("[data-is=truth]").is_disabled()
    page.close()
