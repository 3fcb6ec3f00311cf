"""The page starts both servers itself, says how far they are, and ends them."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from benchmarks.common.browser import ask, browser, opened, playing

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_the_page_shows_servers_that_start_and_ctrl_c_ends_them(chromium_path: str) -> None:
    with browser(chromium_path) as running, playing() as (url, process):
        with opened(running, url) as page:
            page.get_by_text("Starting, usually for less than a minute").first.wait_for()
            assert page.is_disabled("#ask")
            assert page.get_by_role("progressbar", name="ORTHRUS is starting").count() == 1
            assert ask(page).startswith("Both answers are the same")
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 130
        ports = re.findall(r"ready  http://127\.0\.0\.1:(\d+)", said)
        assert len(ports) == 2
        assert not [
            command for command in commands() if "sglang.launch_server" in command and set(ports) & set(command)
        ]


def commands() -> list[list[str]]:
    """The command lines of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_text(errors="replace").split("\0"))
        except OSError:
            continue
    return found
