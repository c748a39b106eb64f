"""The page at `/`, in a real browser and against a real server process."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unetc
from tests.server.bundles import make_class_server, make_free_server
from tests.server.live import Live, serving
from unetc.report.pictures import to_pixels

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.nightly,  # a browser, and a model with free prompts
    pytest.mark.skipif(CHROMIUM is None, reason="there is no browser"),
]

KEY = "a key for tests"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the browser."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, live: Live) -> Iterator[Any]:
    """Open the page; nothing may be written to the console, such as a breach of its policy, and nothing may fail."""
    with browser.new_context() as context:
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))  # it also notes every status of an error
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(live.address)
        page.get_by_role("button", name="Make a picture").wait_for()
        playwright.expect(page.locator(".level")).to_have_count(2)
        yield page
        assert [line for line in said if "Failed to load resource" not in line] == []


def shown(page: Any, index: int = 0) -> Any:
    """Return the pixels of a picture on the page, [height, width, 3]."""
    return drawn(page.locator("#pictures :is(img, canvas)").nth(index))


def drawn(picture: Any) -> Any:
    """Draw a picture on a canvas and read its pixels."""
    flat, width = picture.evaluate("""(picture) => {
        const width = picture.naturalWidth || picture.width, height = picture.naturalHeight || picture.height;
        const canvas = Object.assign(document.createElement('canvas'), { width, height });
        canvas.getContext('2d').drawImage(picture, 0, 0);
        return [Array.from(canvas.getContext('2d').getImageData(0, 0, width, height).data), width];
    }""")
    return np.reshape(flat, (-1, width, 4))[..., :3]


def make(page: Any) -> None:
    """Make a picture and wait for it."""
    page.get_by_role("button", name="Make a picture").click()
    playwright.expect(page.locator("#words")).to_have_text("Finished.", timeout=60_000)


def test_a_picture_is_made_and_compared(page: Any, tiny_bundle: Path) -> None:
    """The picture equals a session's; the full model's and the difference join it."""
    page.get_by_role("radio", name=re.compile("Saves")).check(force=True)
    page.get_by_label("Seed", exact=True).fill("5")
    make(page)
    session = unetc.load(tiny_bundle)
    fast, full = (to_pixels(session.sample(1, seed=5, full_model=whole)[:1])[0] for whole in (False, True))
    np.testing.assert_allclose(shown(page)[..., 0], fast.astype(int), atol=1)
    assert page.locator("#steps i.done").count() == 4
    assert page.locator("#legend li").all_text_contents() == ["Phase 1", "Phase 2"]
    page.get_by_role("button", name="Compare with the full model").click()
    playwright.expect(page.locator("#words")).to_have_text("Compared.", timeout=60_000)
    np.testing.assert_allclose(shown(page, 1)[..., 0], full.astype(int), atol=1)
    np.testing.assert_array_equal(shown(page, 2), np.minimum(4 * np.abs(shown(page, 0) - shown(page, 1)), 255))
    assert "PSNR" in page.locator("#numbers").inner_text()


def test_progress_and_previews_are_shown_and_a_run_can_be_cancelled(page: Any) -> None:
    """While 1,000 steps are made, the phase and a preview are on the page; afterwards another picture can be made."""
    page.get_by_role("radio", name=re.compile("Saves")).check(force=True)
    page.get_by_role("spinbutton", name="Steps").fill("1000")
    page.get_by_role("button", name="Make a picture").click()
    playwright.expect(page.locator("#words")).to_have_text(re.compile("Phase [12]"), timeout=30_000)
    playwright.expect(page.locator("#numbers")).to_have_text(re.compile(r"step \d+ of 1000"))
    playwright.expect(page.locator("#pictures figcaption")).to_have_text("Preview")
    assert page.locator("#legend li.now").count() == 1
    page.get_by_role("button", name="Cancel").click()
    playwright.expect(page.locator("#words")).to_have_text("Cancelled.")
    page.get_by_role("spinbutton", name="Steps").fill("4")
    make(page)


def test_wrong_fields_are_explained(page: Any) -> None:
    """The page checks the fields that it knows, and shows the server's message for the others."""
    page.get_by_label("Seed", exact=True).fill("-1")
    page.get_by_role("button", name="Make a picture").click()
    playwright.expect(page.get_by_role("alert")).to_contain_text("The seed must be a whole number")
    page.get_by_label("Seed", exact=True).fill("1")
    page.get_by_role("spinbutton", name="Steps").fill("777")
    page.get_by_role("button", name="Make a picture").click()
    playwright.expect(page.get_by_role("alert")).to_contain_text("num_inference_steps is 777")
    page.get_by_role("spinbutton", name="Steps").fill("4")
    make(page)
    playwright.expect(page.get_by_role("alert")).to_be_hidden()


def test_prompts_are_offered_where_only_encoded_ones_exist(page: Any) -> None:
    """The field follows the model: a list of prompts, or nothing."""
    playwright.expect(page.get_by_role("combobox", name="Prompt")).to_have_count(0)
    page.get_by_role("combobox", name="Model").select_option("prompted")
    prompts = page.get_by_role("combobox", name="Prompt")
    assert prompts.locator("option").all_text_contents()[:2] == ["a red square", "a blue circle"]
    made = []
    for prompt in ("a red square", "a blue circle"):
        prompts.select_option(prompt)
        make(page)
        made.append(shown(page))
    assert made[0].shape == (32, 32, 3)
    assert (made[0] != made[1]).any()


def test_free_prompts_and_classes(browser: Any, shared: Path) -> None:
    """A model with text encoders has a field for any prompt, and a model of classes a list of them."""
    free = make_free_server(shared) / "bundle"
    classes = make_class_server(shared) / "bundle"
    with serving(f"free={free}", f"classes={classes}") as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(server.address)
        made = []
        for prompt in ("a cat", "a large red circle"):
            page.get_by_role("textbox", name="Prompt").fill(prompt)
            make(page)
            made.append(shown(page))
        assert (made[0] != made[1]).any()
        page.get_by_role("combobox", name="Model").select_option("classes")
        playwright.expect(page.get_by_role("textbox", name="Prompt")).to_have_count(0)
        labels = page.get_by_role("combobox", name="Class")
        assert labels.locator("option").all_text_contents() == list("0123456789")
        for label in ("3", "7"):
            labels.select_option(label)
            make(page)
            made.append(shown(page))
        assert (made[2] != made[3]).any()


def test_every_control_has_a_name_and_the_page_fits_a_phone(browser: Any, live: Live) -> None:
    """For readers of screens, and without scrolling sideways; in the dark scheme too."""
    with browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark") as context:
        page = context.new_page()
        page.goto(live.address)
        playwright.expect(page.locator(".level")).to_have_count(2)
        make(page)
        wide, view = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide <= view
        unnamed = """Array.from(document.querySelectorAll('input, select, textarea, button')).filter(
            (one) => !(one.labels && one.labels.length) && !one.textContent.trim() && !one.ariaLabel
        ).map((one) => one.outerHTML)"""
        assert page.evaluate(unnamed) == []
        assert all(page.locator("#pictures img").evaluate_all("(all) => all.map((one) => one.alt)"))


def test_the_page_loads_nothing_from_elsewhere(live: Live) -> None:
    """One file, with a policy that allows its own script alone."""
    answer = live.get("/")
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"(?:src|href)=\"(?!data:,)[^\"]*\"", answer.text) == []
    assert re.findall(r"https?://|\son\w+=", answer.text) == []


def test_the_page_asks_for_a_key(browser: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    """A wrong key is refused, the right one is kept in memory only."""
    (tmp_path / "keys").write_text(f"{KEY}\n")
    with serving(tiny_bundle, "--api-keys", tmp_path / "keys") as server, browser.new_context() as context:
        assert server.get("/").status_code == 200
        assert server.get("/page/models").status_code == 401
        page = context.new_page()
        page.goto(server.address)
        key = page.get_by_role("textbox", name="API key")
        key.fill("another key")
        key.press("Enter")
        playwright.expect(page.locator("#key-problem")).to_be_visible()
        key.fill(KEY)
        key.press("Enter")
        playwright.expect(page.locator(".level")).to_have_count(2)
        make(page)
        stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert stored == [0, 0, ""]
