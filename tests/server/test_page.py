"""The page in a real browser: by keyboard, on a desk, on a phone, and for a screen reader.

Chromium is Debian's; it is driven by Playwright, and axe looks for what keeps people out.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from judges.test_local import write_model
from server.test_server import Server, started

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
)
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here"),
]
VIEWS = {
    "desk": {"viewport": {"width": 1180, "height": 1000}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "dark": {"viewport": {"width": 1180, "height": 1000}, "color_scheme": "dark"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    model = tmp_path_factory.mktemp("paged")
    write_model(model)
    flags = ["--model", str(model), "--prompt", "toy", "--slots", "4"]
    with started(tmp_path_factory.mktemp("logs"), *flags) as each:
        yield each


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, server) -> Iterator[Any]:
    yield from opened(browser, server, VIEWS["desk"])


def opened(browser: Any, server: Server, view: dict[str, Any]) -> Iterator[Any]:
    """Yield the page; what the browser complains of is a failure."""
    complaints: list[str] = []
    context = browser.new_context(**view)
    page = context.new_page()
    page.on("console", lambda said: complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(f"http://127.0.0.1:{server.port}/")
    yield page
    context.close()
    assert not [each for each in complaints if "status of 400" not in each]


def type_in(page: Any, *texts: str) -> None:
    """Fill the form with the keyboard alone, and judge."""
    page.locator("#question").focus()
    for i, text in enumerate(texts):
        if i:
            page.keyboard.press("Tab")
        page.keyboard.type(text)
    page.keyboard.press("Control+Enter")
    page.locator("#told", has_text="Done").wait_for()


@pytest.mark.parametrize("view", VIEWS)
def test_a_pair_is_judged_by_keyboard_and_nothing_keeps_people_out(browser, server, view):
    for page in opened(browser, server, VIEWS[view]):
        type_in(page, "Name <b>tools</b>.", "<script>alert(1)</script> saw", "drill")
        assert page.locator("#games article").count() == 2
        assert page.locator("script").count() == 1 and page.locator("main b").count() == 0
        assert "Name <b>tools</b>." in page.locator("#history").inner_text()
        found = axe.Axe().run(page).response["violations"]
        assert not [(each["id"], each["impact"]) for each in found]
        width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert width <= 0  # nothing to scroll sideways


def test_a_link_brings_the_same_question_to_another_browser(browser, server, page):
    type_in(page, "Größe?", "one", "two")
    page.locator("#link").click()
    page.locator("#told", has_text="link").wait_for()
    other = browser.new_context().new_page()
    other.goto(page.url)
    assert other.locator("#question").input_value() == "Größe?"
    assert other.locator("#answer-2").input_value() == "two"
    assert other.locator("#history li").count() == 0
    other.context.close()


def test_several_answers_are_ranked(page):
    for i, text in enumerate(("one", "two", "three")):
        if i == 2:
            page.locator("#more").click()
        page.locator(f"#answer-{i + 1}").fill(text)
    page.locator("#question").fill("q")
    page.keyboard.press("Control+Enter")
    page.locator("#told", has_text="Done").wait_for()
    assert page.locator("#verdict td").count() == 15
    assert page.locator("#games article").count() == 6


def test_what_is_kept_comes_back_and_is_forgotten(page):
    type_in(page, "First?", "one", "two")
    page.locator("#question").fill("changed")
    page.reload()
    page.locator("#history button").first.click()
    assert page.locator("#question").input_value() == "First?"
    page.locator("#forget").click()
    assert page.locator("#history li").count() == 0


def test_an_error_of_the_server_is_shown(page):
    page.locator("#question").fill("q")
    for number in (1, 2):
        page.locator(f"#answer-{number}").fill("a")
    page.locator("summary").click()
    page.locator("#votes").fill("3")  # at temperature 0
    page.locator("#go").click()
    said = page.locator("#told.wrong")
    said.wait_for()
    assert said.inner_text() == "votes=3 at temperature 0 would be one text 3 times."
    assert page.locator("#verdict").is_hidden() and page.locator("#go").is_enabled()
