"""The page in a real browser: by keyboard, on a desk, on a phone, and for a screen reader.

Chromium is Debian's; it is driven by Playwright, and axe looks for what keeps people out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import socket
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import uvicorn
from judges.test_local import write_model
from server.test_server import Server, started

from jlrm.evaluation.games import Game, Response
from jlrm.evaluation.reading import Reader
from jlrm.server import app, protocol
from jlrm.server.bodies import Defaults, Drawing
from jlrm.server.service import Piece, Service

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
    yield from opened(browser, server.port, VIEWS["desk"])


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
QUALITY = {"good": 8, "fair": 5, "bad": 2}  # by the word that an answer begins with


@dataclasses.dataclass(frozen=True)
class KnownTexts(Service):
    """A service whose texts are known: random weights write no verdict."""

    async def _responses(
        self, games: Sequence[Game], drawing: Drawing, tell: Callable[[Game, Piece], None]
    ) -> dict[str, Response]:
        found = {}
        for game in games:
            scores = [QUALITY[game.item.answers[i].split()[0]] for i in game.shown]
            rubric, reference = game.item.rubric, game.item.reference
            thought = f"{HOSTILE} The reference: {reference}. To look at: {rubric and rubric.text}"
            lines = [f"{each.name}: {', '.join(map(str, scores))}" for each in rubric_of(game)]
            said = "".join(f"<answer>{score}</answer>" for score in scores)
            text = "\n".join([f"{thought}</think>", *lines, said])
            for end, ending in ((len(text) // 2, ""), (len(text), "stop")):
                tell(game, Piece(0, 0, text[:end], (), ending))
            places = [score + 0.25 for score in scores] * max(len(lines), 1)
            expected = (tuple(places),) if game.item.is_expected else None
            found[game.id] = Response(game.id, (text,), endings=("stop",), expected=expected)
        return found


def rubric_of(game: Game) -> Sequence[Any]:
    return game.item.rubric.criteria if game.item.rubric else ()


@pytest.fixture(scope="module")
def teller() -> Iterator[int]:
    """Serve texts that are known by the routes and the page that serve a model's."""
    engine: Any = types.SimpleNamespace(failure="")
    defaults = Defaults("told", 0.0, 1, 48, 0)
    nothing: Any = None
    service = KnownTexts(nothing, engine, nothing, nothing, Reader(), defaults, "jlrm")
    metrics: Any = types.SimpleNamespace(request=lambda _: contextlib.nullcontext(engine))
    routes = app.make(service, app.Limits(), metrics)
    config = uvicorn.Config(routes, http=protocol.Impatient, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


def opened(browser: Any, port: int, view: dict[str, Any]) -> Iterator[Any]:
    """Yield the page; what the browser complains of is a failure."""
    complaints: list[str] = []
    context = browser.new_context(**view)
    page = context.new_page()
    page.on("console", lambda said: complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(f"http://127.0.0.1:{port}/")
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
    for page in opened(browser, server.port, VIEWS[view]):
        type_in(page, "Name <b>tools</b>.", "<script>alert(1)</script> saw", "drill")
        assert page.locator("#games article").count() == 2
        assert page.locator("main b").count() == 0
        assert "Name <b>tools</b>." in page.locator("#history").inner_text()
        nothing_keeps_people_out(page)


def nothing_keeps_people_out(page: Any, picture: str = "") -> None:
    """Assert that no text became HTML, axe finds nothing, and nothing is to be scrolled sideways.

    picture: name of a screenshot, which is taken if JLRM_SCREENSHOTS names a directory.
    """
    if picture and (shots := os.environ.get("JLRM_SCREENSHOTS")):
        page.screenshot(path=pathlib.Path(shots, f"{picture}.png"), full_page=True)
    assert page.locator("script").count() == 1 and page.locator("main img").count() == 0
    found = axe.Axe().run(page).response["violations"]
    assert not [(each["id"], each["impact"]) for each in found]
    # Not beside innerWidth, which grows on a phone with what is too wide.
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


@pytest.mark.parametrize("view", VIEWS)
def test_rubric_reference_and_expected_scores_by_keyboard(browser, teller, view):
    """Everything by Tab, from the question on; which fields it reaches is their order on the page.

    A name of a criterion is shown as it was written.
    """
    for page in opened(browser, teller, VIEWS[view]):
        rubric = '{"facts": "True?", "<b>style</b>": "Plain words."}'

        def reach(selector: str, page: Any = page) -> None:
            for _ in range(20):
                if page.evaluate(
                    f"document.activeElement === document.querySelector('{selector}')"
                ):
                    return
                page.keyboard.press("Tab")
            raise AssertionError(f"Tab does not reach {selector}")

        page.locator("#question").focus()
        page.keyboard.type("How?")
        for selector, text in (("#answer-1", "good one"), ("#answer-2", "bad one")):
            reach(selector)
            page.keyboard.type(text)
        reach("details summary")
        page.keyboard.press("Enter")
        for selector, text in (("#rubric", rubric), ("#reference", "A <i>right</i> one")):
            reach(selector)
            page.keyboard.type(text)
        reach("details + details summary")
        page.keyboard.press("Space")
        reach("#expected_scores")
        page.keyboard.type("y")  # yes
        nothing_keeps_people_out(page, f"{view}-asked")
        reach("#go")
        page.keyboard.press("Enter")
        page.locator("#told", has_text="Done: Answer 1 is better.").wait_for()
        shown = page.locator("#verdict").inner_text()
        for line in ("facts: 8 and 2", "<b>style</b>: 8 and 2", "Expected scores: 8.25 and 2.25"):
            assert line in shown
        written = page.locator("#games").inner_text()
        assert "The reference: A <i>right</i> one." in written and HOSTILE in written
        assert page.locator("main b, main i").count() == 0
        nothing_keeps_people_out(page, f"{view}-judged")
        page.reload()  # what was asked comes back from what is kept
        page.locator("#history button").first.click()
        assert page.locator("#rubric").input_value() == rubric
        assert page.locator("#expected_scores").input_value() == "true"


@pytest.mark.parametrize("view", ["desk", "phone"])
def test_one_answer_is_scored_by_itself(browser, teller, view):
    for page in opened(browser, teller, VIEWS[view]):
        page.locator("#rubric").evaluate('each => each.value = \'{"facts": "True?"}\'')
        page.locator("#expected_scores").evaluate("each => each.value = 'true'")
        type_in(page, "How?", "fair one")
        shown = page.locator("#verdict").inner_text()
        assert "Score 5" in shown and "facts: 5" in shown and "Expected score: 5.25" in shown
        assert page.locator("#games h2").all_inner_texts() == ["Answer 1 by itself"]
        nothing_keeps_people_out(page, f"{view}-single")


@pytest.mark.parametrize("view", ["desk", "phone"])
def test_a_list_is_ranked_from_the_best_to_the_worst(browser, teller, view):
    for page in opened(browser, teller, VIEWS[view]):
        page.locator("#more").click()
        type_in(page, "How?", "fair one", "bad one")
        assert "Answer 1 is better" in page.locator("#verdict").inner_text()  # the third is empty
        page.locator("#answer-3").fill("good one")
        page.keyboard.press("Control+Enter")
        page.locator("#told", has_text="Done: Answer 3 is best.").wait_for()
        places = page.locator("#verdict td:nth-child(2)").all_inner_texts()
        assert places == ["3", "1", "2"]
        assert page.locator("#verdict td:nth-child(3)").all_inner_texts()[1] == "0"  # and not -0
        titles = page.locator("#games h2").all_inner_texts()
        assert titles[-2:] == ["Answer 2 shown first, then 3", "Answer 3 shown first, then 2"]
        nothing_keeps_people_out(page, f"{view}-list")
        page.locator("summary", has_text="Settings").click()
        page.locator("#at_once").select_option("true")
        page.keyboard.press("Control+Enter")
        page.locator("#told", has_text="Done: Answer 3 is best.").wait_for()
        titles = page.locator("#games h2").all_inner_texts()
        assert titles == [
            "Answers shown in the order 1, 2, 3",
            "Answers shown in the order 3, 2, 1",
        ]
        assert page.locator("#verdict th").all_inner_texts() == [
            *("Place", "Answer", "Score", "Games won")
        ]
        assert page.locator("#verdict td:nth-child(3)").all_inner_texts() == ["8", "5", "2"]
        nothing_keeps_people_out(page, f"{view}-at-once")
        page.locator("#answer-2").fill(" ")
        page.keyboard.press("Control+Enter")
        page.locator("#told.wrong", has_text="Answer 2 is empty.").wait_for()


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
    # Random weights write no verdict, and that is no ranking.
    assert page.locator("#verdict").inner_text() == "No verdict"
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
    page.locator("summary", has_text="Settings").click()
    page.locator("#votes").fill("3")  # at temperature 0
    page.locator("#go").click()
    said = page.locator("#told.wrong")
    said.wait_for()
    assert said.inner_text() == "votes=3 at temperature 0 would be one text 3 times."
    assert page.locator("#verdict").is_hidden() and page.locator("#go").is_enabled()
