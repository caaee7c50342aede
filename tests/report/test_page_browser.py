"""The table of cases in a real browser: sorted by mouse and keyboard, filtered; the contents lead to it."""

from __future__ import annotations

import shutil

import pytest

from tests.evaluation.test_report import page
from tests.evaluation.test_tables import rows

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the optional group 'dev'")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the system package chromium")


def test_the_table_is_sorted_and_filtered():
    made = [row | {"label": label, "hd95_mm": hd95} for row, hd95 in zip(rows(), (9.5, 100.0, 20.0), strict=True)
            for label in ("one", "two")]  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        tab = browser.new_page()
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.set_content("<iframe sandbox='allow-scripts' style='width:100%;height:600px'></iframe>")
        tab.eval_on_selector("iframe", "(frame, html) => { frame.srcdoc = html; }", page(made))
        frame = tab.frame_locator("iframe")

        def cases() -> list[str]:
            return frame.locator(".sortable tbody tr:visible td:first-child").all_text_contents()

        def head(name: str) -> sync_api.Locator:
            return frame.locator(".sortable th", has_text=name)

        frame.locator("output").wait_for()
        frame.locator("nav a", has_text="Cases").click()
        assert cases() == ["b", "b", "<c>", "<c>", "a", "a"]
        head("HD95").locator("button").click()
        assert cases() == ["a", "a", "<c>", "<c>", "b", "b"], "by number, not by text"
        assert head("HD95").get_attribute("aria-sort") == "ascending"
        assert head("Dice").get_attribute("aria-sort") is None
        head("HD95").locator("button").press("Enter")
        assert cases() == ["b", "b", "<c>", "<c>", "a", "a"]
        assert head("HD95").get_attribute("aria-sort") == "descending"
        frame.locator(".bar select").select_option("two")
        assert cases() == ["b", "<c>", "a"]
        assert frame.locator("output").text_content() == "3 of 6 rows"
        frame.locator(".bar input").fill("C")
        assert cases() == ["<c>"]
        assert not errors
        browser.close()
