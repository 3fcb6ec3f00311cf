"""Sends hostile requests, watches the server, and finds the request that ended it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event

import requests

from benchmarks.common.servers import Side
from benchmarks.volume.fuzz.requests import Hostile

TIMEOUT_SECONDS = 20.0
SILENT_SECONDS = 90.0
_KEPT_TEXT = 600
_PROBE = {"text": "Step 1: 3 + 4 =", "sampling_params": {"temperature": 0, "max_new_tokens": 8}}


@dataclass(frozen=True)
class Outcome:
    """What came of a request.

    Attributes:
        status: HTTP; 0 without an answer.
        text: the beginning of the answer, or the error.
        timed_out: whether we left while the server was silent.
        sent: whether it went out at all.
    """

    status: int
    text: str = ""
    seconds: float = 0.0
    timed_out: bool = False
    sent: bool = True

    @property
    def is_server_error(self) -> bool:
        """A 5xx, or an error of that kind in a stream."""
        return self.status >= 500 or (self.status == 200 and '"code":500' in self.text.replace(" ", ""))


def send(url: str, request: Hostile, timeout: float = TIMEOUT_SECONDS) -> Outcome:
    """One request. After `timeout` seconds the client is gone, and the server has to notice."""
    started = time.monotonic()
    headers = {"Content-Type": request.content_type}
    try:
        with requests.request(
            request.method, url + request.path, data=request.payload, headers=headers, timeout=timeout, stream=True
        ) as response:
            text = b""
            for chunk in response.iter_content(chunk_size=None):
                text += chunk if len(text) < 100_000 else b""
                if time.monotonic() - started > timeout:
                    raise requests.Timeout("the answer goes on and on")
            shown = text.decode(errors="replace")
            end = shown[-_KEPT_TEXT:] if len(shown) > 2 * _KEPT_TEXT else ""
            shown = shown[:_KEPT_TEXT] + end if end else shown
            return Outcome(response.status_code, shown, time.monotonic() - started)
    except requests.Timeout as error:
        return Outcome(0, f"no answer: {error}"[:_KEPT_TEXT], time.monotonic() - started, timed_out=True)
    except (requests.RequestException, ValueError) as error:
        return Outcome(0, f"{type(error).__name__}: {error}"[:_KEPT_TEXT], time.monotonic() - started)


def send_all(side: Side, batch: Sequence[Hostile], in_flight: int, timeout: float) -> list[Outcome]:
    """A batch; nothing more is sent once the connection broke and the server is gone."""
    dead = Event()

    def one(request: Hostile) -> Outcome:
        if dead.is_set():
            return Outcome(0, sent=False)
        outcome = send(side.url, request, timeout)
        if outcome.status == 0 and not outcome.timed_out and not accepts(side):
            dead.set()
        return outcome

    with ThreadPoolExecutor(in_flight) as pool:
        return list(pool.map(one, batch))


def accepts(side: Side) -> bool:
    """Whether anybody listens."""
    try:
        requests.get(f"{side.url}/ping", timeout=SILENT_SECONDS)
    except requests.ConnectionError:
        return False
    except requests.RequestException:
        return True
    return True


def probe(side: Side, patience: float = SILENT_SECONDS) -> float | None:
    """Seconds that a plain request takes; None if it gets no answer, so that the server is dead or silent."""
    started = time.monotonic()
    try:
        reply = requests.post(f"{side.url}/generate", json=_PROBE, timeout=patience)
    except requests.RequestException:
        return None
    return time.monotonic() - started if reply.status_code == requests.codes.ok else None


def clear(side: Side) -> None:
    """Abort whatever clients left behind."""
    try:
        requests.post(f"{side.url}/abort_request", json={"abort_all": True}, timeout=30)
    except requests.RequestException:
        return


@dataclass
class Autopsy:
    """Which request ended a server.

    Attributes:
        culprits: requests that end it, each alone; or, if none does, all that were on the way together.
        alone: whether one is enough.
        error: the last exception of the server's log.
    """

    culprits: list[Hostile] = field(default_factory=list)
    alone: bool = True
    error: str = ""


def find_culprits(side: Side, suspects: Sequence[Hostile], timeout: float) -> Autopsy:
    """Restart the server and send the suspects one by one, each followed by a plain request."""
    error = side.last_error()
    side.start()
    for request in suspects:
        outcome = send(side.url, request, timeout)
        if (outcome.status == 0 and not accepts(side)) or probe(side) is None:
            found = Autopsy([request], True, side.last_error() or error)
            side.start()
            return found
    send_all(side, suspects, len(suspects) or 1, timeout)
    if probe(side) is None:
        found = Autopsy(list(suspects), False, side.last_error() or error)
        side.start()
        return found
    return Autopsy([], False, error)


def ends(side: Side, request: Hostile, timeout: float) -> tuple[bool, Outcome]:
    """Whether a request, alone, ends this server (which is restarted then); and its outcome."""
    outcome = send(side.url, request, timeout)
    is_dead = (outcome.status == 0 and not accepts(side)) or probe(side) is None
    if is_dead:
        side.start()
    return is_dead, outcome
