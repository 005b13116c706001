"""The page in a real browser: Chromium, where there is one."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import SHAPES, Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.rare, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


@pytest.fixture
def page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # a sandbox needs what containers and root do not have
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened: Any = browser.new_page(viewport={"width": 1100, "height": 900})
        opened.wrong, opened.asked = list[str](), list[str]()
        opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
        opened.on("console", lambda said: opened.wrong.append(said.text) if said.type == "error" else None)
        opened.on("request", lambda asked: opened.asked.append(asked.url))
        opened.set_default_timeout(60_000)
        yield opened
        browser.close()


def serious(page: Any) -> list[str]:
    """What axe-core finds that keeps somebody from something."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")]


def until(page: Any, true: str) -> None:
    """Wait for a condition of the page, whose policy lets nobody add a script that waits there."""
    end = time.monotonic() + 30
    while not page.evaluate(true):
        assert time.monotonic() < end, true
        time.sleep(0.05)


def test_a_chain_from_the_upload_to_the_joined_video(quick: Served, page: Any) -> None:
    shots = Path(os.environ["WAN_SCREENSHOTS"]) if "WAN_SCREENSHOTS" in os.environ else None

    def shoot(name: str) -> None:
        if shots is not None:
            page.screenshot(path=shots / f"{name}.png", full_page=True)

    page.goto(quick.url)
    page.set_input_files("#video", SHAPES)
    page.fill("#prompt", "A green circle moves left.")
    page.fill("#num_videos", "2")
    page.get_by_text("Settings", exact=True).click()
    page.get_by_text("Sampling", exact=True).click()
    page.fill("#s_sample_steps", "8")
    assert serious(page) == []
    page.click("#look")
    page.wait_for_selector("#start:not([disabled])")
    assert "2 clips of 160x96" in page.inner_text("#plan-lines")
    shoot("start")
    page.click("#start")
    page.wait_for_url("**/chains/*")
    page.wait_for_selector("#preview:not([hidden])")
    assert page.evaluate("document.querySelector('#preview').complete")
    shoot("making")
    page.wait_for_selector("#now-words[data-status=completed]")
    page.wait_for_selector("#clip-2 .prompt")
    seeds = [page.inner_text(f"#clip-{number} .quiet") for number in (1, 2)]

    page.click("#clip-2 .edit summary")
    page.fill("#p2", "A red square turns.")
    page.click("#clip-2 .edit form button:has-text('Go on from here')")
    page.wait_for_selector("#clip-2 .prompt:has-text('A red square turns.')")
    page.wait_for_selector("#now-words[data-status=completed]")
    assert page.inner_text("#clip-1 .quiet") == seeds[0]  # it was kept

    until(page, "document.querySelector('#joined').readyState >= 2")
    page.click(".seek >> nth=1")
    until(page, "document.querySelector('#joined').currentTime > 0.6")
    page.evaluate("document.querySelector('#joined').pause()")
    assert serious(page) == []
    until(page, "[...document.querySelectorAll('.thumb')].every((one) => one.complete && one.naturalWidth > 0)")
    shoot("chain")

    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 20)"
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert serious(page) == []
    shoot("phone")
    page.goto(quick.url)
    page.wait_for_selector(".queue a:has-text('shapes.mp4')")
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and serious(page) == []
    page.keyboard.press("n")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.wrong == []
    assert {re.sub(r"(//[^/]*).*", r"\1", url) for url in page.asked if not url.startswith(("data:", "blob:"))} == {
        quick.url
    }
