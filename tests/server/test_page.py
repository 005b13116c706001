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

# .ci/run installs it: there these tests may not be left out
missing = CHROMIUM is None and "CI" not in os.environ
pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing, reason="needs Chromium")]


@pytest.fixture
def page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # a sandbox needs what containers and root do not have
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened: Any = browser.new_page(viewport={"width": 1100, "height": 900})
        opened.wrong, opened.asked = list[str](), list[str]()
        opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
        opened.on("console", lambda message: opened.wrong.append(message.text) if is_fault(message) else None)
        opened.on("response", lambda answer: opened.wrong.append(answer.url) if is_refused(answer) else None)
        opened.on("request", lambda asked: opened.asked.append(asked.url))
        opened.set_default_timeout(60_000)
        yield opened
        browser.close()


def is_fault(message: Any) -> bool:
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def is_refused(answer: Any) -> bool:
    """But for pictures of a clip that is just being replaced."""
    return answer.status >= 400 and not re.search(r"/clips/\d+/(thumbnail|seam/\d)\?", answer.url)


def pictures_are_there(page: Any) -> None:
    page.evaluate("for (const one of document.querySelectorAll('.clip img')) one.loading = 'eager'")
    until(page, "[...document.querySelectorAll('.clip img')].every((one) => one.complete && one.naturalWidth > 0)")


def serious(page: Any) -> list[str]:
    """What axe-core finds that keeps somebody from something."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in violations if one["impact"] in ("serious", "critical")]


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
    page.fill("#s_sample_steps", "60")  # three seconds a clip, so that there is a preview to see
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

    pictures = [page.get_attribute(f"#clip-{number} .thumb", "src") for number in (1, 2)]
    page.click("#clip-2 .edit summary")
    page.fill("#p2", "A red square turns.")
    page.click("#clip-2 .edit form button:has-text('Go on from here')")
    page.wait_for_selector("#clip-2 .prompt:has-text('A red square turns.')")
    page.wait_for_selector("#now-words[data-status=completed]")
    assert page.inner_text("#clip-1 .quiet") == seeds[0]  # it was kept
    assert page.get_attribute("#clip-1 .thumb", "src") == pictures[0]
    # a browser shows what it has of an address, and the seed is the same
    assert page.get_attribute("#clip-2 .thumb", "src") != pictures[1]

    until(page, "document.querySelector('#joined').readyState >= 2")
    page.click(".seek >> nth=1")
    until(page, "document.querySelector('#joined').currentTime > 0.6")
    page.evaluate("document.querySelector('#joined').pause()")
    assert serious(page) == []
    pictures_are_there(page)
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


@pytest.mark.rare
def test_takes_a_cut_and_another_seed_by_mouse_and_by_keys(quick: Served, page: Any, tmp_path: Path) -> None:
    finished = "#now-words[data-status=completed]"
    page.goto(quick.url)
    page.set_input_files("#video", SHAPES)
    page.fill("#prompt", "A red square turns.")
    page.fill("#num_videos", "2")
    page.keyboard.press("Enter")
    page.wait_for_selector("#start:not([disabled])")
    page.click("#discard")
    page.wait_for_selector("#plan", state="hidden")
    page.focus("#look")
    page.keyboard.press("Enter")
    page.wait_for_selector("#start:not([disabled])")
    page.keyboard.press("Enter")  # the plan has the focus
    page.wait_for_url("**/chains/*")
    page.wait_for_selector(finished)
    name = page.url.rsplit("/", 1)[1]
    assert all(one["status"] != "draft" for one in quick.ask("/v1/chains")[1]["data"])  # nobody wanted it

    def clip(number: int) -> Any:
        return quick.ask(f"/v1/chains/{name}")[1]["clips"][number - 1]

    def made_again(number: int, before: Any) -> Any:
        until(
            page, f"!document.querySelector('#clip-{number} .quiet')?.textContent.startsWith('seed {before['seed']},')"
        )
        page.wait_for_selector(finished)
        return clip(number)

    page.click("#clip-2 .edit summary")
    page.fill("#t2", "2")
    page.click("#clip-2 .edit form button:has-text('Go on from here')")
    page.wait_for_selector("#clip-2 .takes figure >> nth=1")
    page.wait_for_selector(finished)
    assert serious(page) == []
    before = clip(2)
    page.wait_for_selector(f"#clip-2 .takes figure:nth-child({before['take']}):has-text('in the video')")
    page.click("#clip-2 .takes button:has-text('Go on from this')")
    after = made_again(2, before)
    assert after["take"] == 3 - before["take"] and clip(1)["seed"] != after["seed"]

    page.click("#clip-1 .edit summary")
    first = clip(1)
    page.click("#clip-1 button:has-text('Another seed')")
    assert made_again(1, first)["said"]["seed"] == clip(1)["seed"] != first["seed"]

    shot = tmp_path / "night.png"
    page.screenshot(path=shot)
    page.click("#clip-2 .edit summary")
    page.set_input_files("#c2", shot)
    page.click("#clip-2 .edit form button:has-text('Go on from here')")
    until(page, "document.querySelector('#now-words').dataset.status !== 'completed'")
    page.wait_for_selector(finished)
    assert clip(2)["said"]["cut"].startswith("picture_")

    until(page, "document.querySelector('#joined').readyState >= 2")
    page.click("h2 >> nth=0")  # off the fields
    seam = float(page.get_attribute(".seek >> nth=1", "data-time"))
    page.keyboard.press("j")
    until(page, f"Math.abs(document.querySelector('#joined').currentTime - {seam}) < 0.05")
    page.keyboard.press("k")
    until(page, "document.querySelector('#joined').currentTime < 0.05")
    page.keyboard.press(" ")
    until(page, "!document.querySelector('#joined').paused")
    page.keyboard.press(" ")
    until(page, "document.querySelector('#joined').paused")
    pictures_are_there(page)
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("button:has-text('Delete')")
    page.wait_for_url(quick.url + "/")
    assert quick.ask(f"/v1/chains/{name}")[0] == 404
    assert page.wrong == []
