"""A real Chromium, and the page of `python -m sglang_orthrus play` in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import requests

from sglang_orthrus.cli.server import free_port

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
# Both answers have ended, in one way or another.
DONE = "#verdict:is([data-kind='equal'], [data-kind='different'], [data-kind='failed'])"
_SECONDS = 300


class NoBrowserError(RuntimeError):
    """There is no Chromium here, or nothing to drive it. The message says what to install."""


def chromium() -> str:
    """Its path.

    Raises:
        NoBrowserError: there is none.
    """
    if find_spec("playwright") is None:
        raise NoBrowserError("needs Playwright: pip install '.[play]'")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise NoBrowserError(f"needs a Chromium, one of {', '.join(NAMES)} (Debian: apt-get install chromium)")
    return found


@contextmanager
def browser(path: str) -> Iterator[Any]:
    """A headless browser. path: of a Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root, as in a container, may not use the sandbox.
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        try:
            yield running
        finally:
            running.close()


@contextmanager
def playing(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page's address, and its process."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "sglang_orthrus", "play", "--port", str(port), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # What starts a test in the background may have it ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_page(url, process)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


def wait_for_page(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            requests.get(url, timeout=5)
            return
        except requests.RequestException:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the page does not answer"
            time.sleep(0.2)


@contextmanager
def opened(running: Any, url: str, **options: Any) -> Iterator[Any]:
    """The page in a fresh context. It may not say anything on its console, nor load anything from elsewhere."""
    context = running.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
    complaints: list[str] = []
    page = context.new_page()
    page.set_default_timeout(1e3 * _SECONDS)
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.extend([] if request.url.startswith(url) else [request.url]))
    try:
        page.goto(url)
        yield page
        assert complaints == []
    finally:
        context.close()


def ask(page: Any, example: str | None = None) -> str:
    """Ask, once both servers are ready, and return the verdict."""
    ready(page)
    if example:
        page.get_by_role("button", name=example, exact=True).click()
    page.get_by_role("button", name="Ask", exact=False).click()
    page.wait_for_selector(DONE)
    return str(page.inner_text("#verdict"))


def ready(page: Any) -> None:
    """Wait until the servers are."""
    page.wait_for_selector("#ask:not([disabled])")
    page.wait_for_selector("#plain-server:is([data-stage='ready'], [data-stage='absent'])")


def spans(page: Any, side: str) -> list[str]:
    """The texts of an answer's chunks."""
    return list(page.locator(f"#{side} .answer > span").all_text_contents())
