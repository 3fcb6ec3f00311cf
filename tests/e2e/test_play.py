"""The page in a real Chromium, before real servers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.common.browser import DONE, ask, browser, opened, playing, ready, spans
from sglang_orthrus.cli.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# Notes how long an answer's text is whenever something is added to it.
GROWTH = """
  window.growth = [];
  document.addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
    const answer = document.querySelector("#orthrus .answer");
    if (answer) window.growth.push(answer.childElementCount);
  }).observe(document, { childList: true, subtree: true }));
"""
# So many numbers that nobody waits for their end.
LONG = {"type": "array", "items": {"type": "integer"}, "minItems": 2000}


@pytest.fixture(scope="module")
def chrome(chromium_path: str) -> Iterator[Any]:
    with browser(chromium_path) as running:
        yield running


@pytest.fixture(scope="module")
def url(chrome: Any, orthrus: Server, plain: Server) -> Iterator[str]:
    with playing("--url", f"{orthrus.url}/v1", "--plain-url", plain.url) as (address, _):
        yield address


@pytest.fixture
def page(chrome: Any, url: str) -> Iterator[Any]:
    with opened(chrome, url) as opened_page:
        yield opened_page


def test_both_answers_are_equal_and_come_in_rounds(page: Any) -> None:
    page.add_init_script(GROWTH)
    page.reload()
    assert ask(page, "Arithmetic").startswith("Both answers are the same")
    rounds, steps = spans(page, "orthrus"), spans(page, "plain")
    assert "".join(rounds) == "".join(steps) and "Answer: " in "".join(rounds)
    assert len(rounds) < len(steps)
    assert max(map(len, rounds)) > 20  # characters that appeared at once
    growth = page.evaluate("window.growth")
    assert growth == sorted(growth) and growth[-1] == len(rounds)
    assert page.locator("#orthrus .answer .r1").count() and page.locator("#orthrus .answer .r2").count()
    assert page.locator("#plain .answer .s1").count()


def test_figures_and_charts_are_those_of_the_answers(page: Any) -> None:
    assert ask(page, "Arithmetic").startswith("Both answers are the same"), page.inner_text("#columns")
    figures = {side: page.locator(f"#{side} dd").all_inner_texts() for side in ("orthrus", "plain")}
    assert figures["plain"][1] == "1.0" and float(figures["orthrus"][1]) > 2
    assert all(float(value.split()[0]) > 0 for values in figures.values() for value in values)
    for side, unit in (("orthrus", "round"), ("plain", "step")):
        assert page.locator(f"#{side} .chart rect").count() == len(spans(page, side))
        assert unit in page.locator(f"#{side} .chart").get_attribute("aria-label")
    assert "accepted" in page.inner_text("#orthrus .drafts")
    assert not page.is_visible("#plain .drafts")


def test_own_tokens_are_underlined_where_rounds_came_one_by_one(page: Any) -> None:
    ask(page, "Arithmetic")
    if "unknown" not in page.inner_text("#orthrus .drafts"):
        assert page.locator("#orthrus .answer .own").count()
    assert page.locator("#plain .answer .own").count() == 0


def test_a_schema_constrains_both_and_its_repairs_are_counted(page: Any) -> None:
    assert ask(page, "JSON").startswith("Both answers are the same")
    assert json.loads("".join(spans(page, "orthrus")))["customer"] == "Grace Novak"
    page.get_by_text("the schema repaired").wait_for()
    page.get_by_role("button", name="Tool call").click()
    assert page.input_value("#schema") == "" and json.loads(page.input_value("#tools"))


def test_tools_are_called(page: Any) -> None:
    assert ask(page, "Tool call").startswith("Both answers are the same")
    assert '"name": "book_flight"' in "".join(spans(page, "orthrus"))


def test_a_bad_schema_is_explained_beside_its_box(page: Any) -> None:
    ready(page)
    page.locator("#schema-part summary").click()
    page.get_by_label("JSON schema that").fill('{"type": "<img src=x onerror=alert(1)>"}')
    assert ask(page) == "Both servers refused the request."
    error = page.locator("#schema-error")
    assert "Unsupported type" in error.inner_text() and "<img src=x" in error.inner_text()
    assert page.locator("img").count() == 0
    assert error.get_attribute("role") == "alert"
    assert page.get_attribute("#schema", "aria-invalid") == "true"
    assert page.get_attribute("#schema", "aria-describedby") == "schema-error"
    assert spans(page, "orthrus") == []
    page.fill("#schema", "")
    assert error.inner_text() == "" and page.get_attribute("#schema", "aria-invalid") is None


def test_bad_tools_are_explained_beside_their_box(page: Any) -> None:
    ready(page)
    page.locator("#tools-part summary").click()
    box = page.get_by_label("Tools, a JSON array")
    for text, words in (("[{", "This is no JSON"), ("{}", "put [ ] around them")):
        box.fill(text)
        page.get_by_role("button", name="Ask both").click()
        assert words in page.inner_text("#tools-error")
    box.fill('[{"a": 1}]')
    assert ask(page) == "Both servers refused the request."
    assert page.inner_text("#tools-error") == "tools[0].function: Field required"


def test_stop_ends_the_requests_on_the_servers(page: Any, orthrus: Server, plain: Server) -> None:
    ready(page)
    page.locator("#schema-part summary").click()
    page.fill("#schema", json.dumps(LONG))
    page.locator("#options-part summary").click()
    page.fill("#max-tokens", "1500")
    page.get_by_label("One after the other").uncheck()
    page.get_by_role("button", name="Ask both").click()
    page.wait_for_selector("#orthrus .answer > span")
    page.wait_for_selector("#plain .answer > span")
    assert page.get_attribute("#orthrus .answer", "aria-busy") == "true"
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert page.get_attribute("#orthrus .answer", "aria-busy") == "false"
    for server in (orthrus, plain):
        wait_until_idle(server)


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 120
    while num_running(server):
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.2)


def num_running(server: Server) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("sglang:num_running_reqs{"))


def test_the_replay_shows_the_same_answers(page: Any) -> None:
    verdict = ask(page, "Question")
    before = [spans(page, side) for side in ("orthrus", "plain")]
    page.get_by_role("button", name="Replay slowly").click()
    page.get_by_text("ten times as slow").wait_for()
    page.wait_for_selector(DONE)
    assert [spans(page, side) for side in ("orthrus", "plain")] == before
    page.get_by_role("button", name="Replay slowly").click()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(DONE)
    assert page.inner_text("#verdict") == verdict
    assert [spans(page, side) for side in ("orthrus", "plain")] == before


def test_a_keyboard_is_enough(page: Any) -> None:
    ready(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answers"
    names = []
    for _ in range(40):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        if names[-1] == "ask":
            break
    assert names[0] == "Arithmetic" and {"Chat", "prompt", "in-turn", "ask"} <= set(names)
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("How do you work?")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(DONE)
    page.focus("#ask")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:disabled")
    page.wait_for_selector(DONE)
    assert page.evaluate("document.activeElement.id") == "ask"
    assert "I write in rounds." in "".join(spans(page, "orthrus"))


def test_a_screen_reader_finds_names_and_news(page: Any) -> None:
    ready(page)
    for details in page.locator("details").all():
        details.evaluate("details => { details.open = true; }")
    assert page.get_by_role("heading", name="One model, two views").count() == 1
    assert page.get_by_role("status").get_attribute("id") == "verdict"
    assert page.get_by_role("article", name="ORTHRUS", exact=True).count() == 1
    assert page.get_by_role("group", name="Answer of Plain SGLang").count() == 1
    assert page.get_by_role("list", name="Servers").count() == 1
    unnamed = page.locator("input, textarea, button").evaluate_all(
        "elements => elements.filter(one => !one.textContent.trim() && !one.labels?.length).map(one => one.id)"
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(chrome: Any, url: str, width: int, scheme: str) -> None:
    window = {"width": width, "height": 860}
    with opened(chrome, url, viewport=window, color_scheme=scheme, reduced_motion="reduce") as page:
        ask(page, "Code")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        left, right = (page.locator(f"#{side}").bounding_box() for side in ("orthrus", "plain"))
        if width > 1000:
            assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
        else:
            assert left["x"] == right["x"] and left["y"] + left["height"] < right["y"]
        assert (
            page.evaluate("getComputedStyle(document.querySelector('#orthrus .answer > span')).animationName") == "none"
        )


def test_without_a_plain_server_one_column_answers(chrome: Any, orthrus: Server) -> None:
    with playing("--url", orthrus.url) as (address, _), opened(chrome, address) as page:
        ready(page)
        assert "No server of plain SGLang was named" in page.inner_text("#plain .notice")
        page.get_by_role("button", name="Ask ORTHRUS").click()
        page.get_by_text("nothing is compared").wait_for()
        assert "Answer: " in "".join(spans(page, "orthrus"))


def test_a_server_that_is_missing_is_named(chrome: Any) -> None:
    with playing("--url", "http://127.0.0.1:9") as (address, _), opened(chrome, address) as page:
        page.wait_for_selector("#orthrus-server[data-stage='unreachable']")
        assert "No SGLang server answers at http://127.0.0.1:9" in page.inner_text("#orthrus .notice")
        assert page.is_disabled("#ask")
        page.get_by_text("There is no ORTHRUS server.").wait_for()
