"""The two servers behind the page: started here, or running elsewhere. A thread watches each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import requests

from sglang_orthrus.cli.server import Server, ServerError

ORTHRUS = "orthrus"
PLAIN = "plain"
_RETRY_SECONDS = 2.0


class Stage(StrEnum):
    """How far a server is. ABSENT: nobody named one."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    ABSENT = "absent"


class Side:
    """What the page says of one server. Its thread writes, the page's server reads.

    Attributes:
        words: for people, on what is happening, or what to do.
        is_unreachable: set where a request finds a running server gone.
    """

    def __init__(self, name: str, stage: Stage = Stage.STARTING, words: str = "") -> None:
        self.name = name
        self.url: str | None = None
        self.is_unreachable = threading.Event()
        self._since = time.monotonic()
        self._state: dict[str, Any] = {}
        self.tell(stage, words)

    def tell(self, stage: Stage, words: str = "", **facts: Any) -> None:
        """Change what the page says, at once."""
        self._state = {"stage": stage, "words": words, **facts}

    @property
    def is_ready(self) -> bool:
        """Whether requests can be sent."""
        return self._state["stage"] is Stage.READY

    @property
    def has_metrics(self) -> bool:
        """Whether the server counts drafts for everyone to read."""
        return bool(self._state.get("metrics"))

    def state(self) -> dict[str, Any]:
        """For the page."""
        return {**self._state, "url": self.url, "seconds": round(time.monotonic() - self._since)}

    def connect(self, url: str) -> None:
        """Ask the server what it is, and be ready.

        Raises:
            requests.RequestException: it does not answer.
        """
        response = requests.get(f"{url}/server_info", timeout=10)
        response.raise_for_status()
        info = response.json()
        self.url = url
        self.is_unreachable.clear()
        self.tell(Stage.READY, advice(self.name, info), **facts_of(info))


def facts_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of `/server_info`, which has much more."""
    return {
        "model": Path(str(info.get("model_path", ""))).name,
        "algorithm": info.get("speculative_algorithm"),
        "width": info.get("speculative_num_draft_tokens"),
        "metrics": bool(info.get("enable_metrics")),
    }


def advice(name: str, info: Mapping[str, Any]) -> str:
    """What is not as the comparison wants it; empty if all is."""
    algorithm = info.get("speculative_algorithm")
    if name == ORTHRUS and algorithm != "ORTHRUS":
        return "This server runs without --speculative-algorithm ORTHRUS, so there are no rounds to see."
    if name == PLAIN and algorithm:
        return f"This server speculates, too ({algorithm}), so this is no comparison with plain SGLang."
    if info.get("stream_interval") not in (None, 1):
        return "This server streams several rounds at once (--stream-interval), so their shades are merged."
    return ""


class _StoppedError(Exception):
    """The page was closed while a server started."""


def launch(side: Side, make: Callable[[Callable[[float, str], None]], Server], stop: threading.Event) -> None:
    """Start a server and keep it until `stop`. Runs in a thread of its own.

    NOTE: the kernel ends a server with the thread that started it.

    Args:
        make: the server, not started, which reports its progress to this function.
    """

    def progress(seconds: float, line: str) -> None:
        if stop.is_set():
            raise _StoppedError
        # Other lines, such as warnings of libraries, tell nobody how far it is.
        if line.startswith("["):
            side.tell(Stage.STARTING, line.split("] ", 1)[-1][:80])

    try:
        with make(progress) as server:
            side.connect(server.url)
            while not stop.wait(_RETRY_SECONDS / 2):
                if not server.is_running:
                    side.tell(Stage.FAILED, f"The server ended by itself. Its log ends with:\n{server.log_tail(12)}")
                    return
    except _StoppedError:
        return
    except (ServerError, OSError, ValueError, requests.RequestException) as error:
        side.tell(Stage.FAILED, str(error))


def follow(side: Side, url: str, stop: threading.Event) -> None:
    """Connect to a server that runs elsewhere, again where it gets lost. Runs in a thread of its own."""
    while not stop.is_set():
        try:
            side.connect(url)
        except (requests.RequestException, ValueError) as error:
            reason = type(error).__name__
            side.tell(Stage.UNREACHABLE, f"No SGLang server answers at {url} ({reason}). Start one; this page retries.")
            stop.wait(_RETRY_SECONDS)
            continue
        while not stop.wait(_RETRY_SECONDS / 4) and not side.is_unreachable.is_set():
            pass
