"""The fuzz: its generators, and how it tells whose fault an answer is. No SGLang: small servers in its place."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any, cast

import pytest

from benchmarks.common.servers import Side, Sides
from benchmarks.volume.fuzz.client import Outcome, find_culprits, probe, send
from benchmarks.volume.fuzz.grammars import constraint
from benchmarks.volume.fuzz.requests import BASES, Hostile, encoded, request
from benchmarks.volume.fuzz.run import Fuzz, run, stream

Answers = Callable[[bytes], int]
"""The status for a payload; 0 to stop serving without an answer."""


class Toy(Side):
    """A server that answers by a rule, and can be started again."""

    def __init__(self, name: str, answers: Answers) -> None:
        super().__init__(name)
        self._answers = answers
        self._http: ThreadingHTTPServer | None = None

    def start(self) -> None:
        self.stop()
        toy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, b"{}")

            def do_POST(self) -> None:
                payload = self.rfile.read(int(self.headers["Content-Length"]))
                status = toy._answers(payload) if b"3 + 4 =" not in payload else 200
                if status:
                    self.reply(status, b"{}")
                else:
                    threading.Thread(target=toy.stop).start()

            def reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.starts += 1

    def stop(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            http.shutdown()
            http.server_close()


class Toys:
    """Both sides."""

    def __init__(self, ours: Answers, theirs: Answers) -> None:
        self.orthrus, self.plain = Toy("orthrus", ours), Toy("plain", theirs)

    @property
    def all(self) -> list[Side]:
        return [self.orthrus, self.plain]


@contextmanager
def fuzzing(ours: Answers, theirs: Answers) -> Iterator[Fuzz]:
    toys = Toys(ours, theirs)
    for side in toys.all:
        side.start()
    try:
        yield Fuzz(cast(Sides, toys), in_flight=1, timeout=2.0)
    finally:
        for side in toys.all:
            side.stop()


def hostile(*payloads: bytes) -> list[Hostile]:
    return [Hostile(number, f"kind {payload!r}", "/generate", payload) for number, payload in enumerate(payloads)]


def fine(payload: bytes) -> int:
    return 400 if b"bad" in payload else 200


def fails(payload: bytes) -> int:
    return 500 if b"bad" in payload else 200


def dies(payload: bytes) -> int:
    return 0 if b"bad" in payload else 200


# -- generators


def test_a_request_is_a_function_of_seed_and_number() -> None:
    first, second = ([request(3, number) for number in range(400)] for _ in range(2))
    assert first == second
    assert first != [request(4, number) for number in range(400)]
    assert json.dumps([one.as_json() for one in first])


def test_every_interface_and_kind_comes() -> None:
    found = [request(0, number) for number in range(3000)]
    assert {one.path for one in found} == set(BASES)
    text = " ".join({one.kind for one in found})
    for word in (
        "grammar: ebnf",
        "grammar: nested",
        "grammar: large schema",
        "ids: prompt",
        "logprobs",
        "pair: integer",
    ):
        assert word in text
    assert any(b"NaN" in one.payload for one in found)
    assert any(b"\\ud8" in one.payload for one in found)
    assert any(b"\xff\xfe" in one.payload for one in found)
    assert any(len(one.payload) > 900_000 for one in found)


def test_grammars_hold_the_known_traps() -> None:
    random = Random(0)
    text = "\n".join(encoded(constraint(random)[1]).decode() for _ in range(1500))
    for trap in ('\\"a\\" root', "a{2000000}", '\\"$ref\\": \\"#\\"', "a{100000000}"):
        assert trap in text


def test_our_own_generators_need_no_schema() -> None:
    assert [one.source for one in stream(None, 0, 5)] == ["own"] * 5


def test_schemathesis_and_hypothesis_add_theirs() -> None:
    pytest.importorskip("schemathesis")
    body = {"content": {"application/json": {"schema": {"type": "object", "properties": {"text": {"type": "string"}}}}}}
    operation = {"requestBody": body, "responses": {"200": {"description": "fine"}}}
    spec = {"openapi": "3.1.0", "info": {"title": "x", "version": "1"}, "paths": {"/generate": {"post": operation}}}
    found = list(stream(spec, 0, 40))
    assert {one.source for one in found} == {"own", "schemathesis", "hypothesis"}
    assert [one.payload for one in found] == [one.payload for one in stream(spec, 0, 40)]


# -- whose fault


def test_a_refusal_is_no_failure() -> None:
    with fuzzing(fine, fine) as fuzz:
        fuzz.batch(hostile(b"good", b"bad"))
        assert (fuzz.sent, fuzz.failures, dict(fuzz.statuses)) == (2, [], {"200": 1, "400": 1})
        assert len(fuzz.probes) == 1


def test_a_5xx_is_a_failure_unless_plain_sglang_gives_it_too() -> None:
    with fuzzing(fails, fine) as fuzz:
        fuzz.batch(hostile(b"bad"))
        assert [failure["what"] for failure in fuzz.failures] == ["5xx"]
    with fuzzing(fails, fails) as fuzz:
        fuzz.batch(hostile(b"bad"))
        assert not fuzz.failures and len(fuzz.plain_too) == 1


def test_the_request_that_ends_the_server_is_found_and_not_sent_again() -> None:
    with fuzzing(dies, fine) as fuzz:
        unsent = fuzz.batch(hostile(b"good", b"bad", b"other"))
        assert [one.payload for one in unsent] == [b"other"]
        (failure,) = fuzz.failures
        assert (failure["what"], failure["payload"]) == ("ends the server", "bad")
        assert probe(fuzz.sides.orthrus) is not None
        fuzz.batch([*hostile(b"good", b"other"), Hostile(9, "kind b'bad'", "/generate", b"bad")])
        assert fuzz.skipped == 1 and len(fuzz.failures) == 1


def test_a_server_that_was_started_elsewhere_is_not_fuzzed_once_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with fuzzing(dies, fine) as fuzz:
        monkeypatch.setattr(fuzz.sides.orthrus, "start", lambda: None)
        monkeypatch.setattr(fuzz, "report", lambda seconds, seed: {})  # toys tell nothing of a pool
        run(fuzz, iter(hostile(b"bad", *[b"good"] * 300)), 0, None)
        assert len(fuzz.failures) == 1
        assert fuzz.sent < 101


def test_what_plain_sglang_does_not_survive_is_named() -> None:
    with fuzzing(fails, dies) as fuzz:
        fuzz.batch(hostile(b"bad"))
        assert not fuzz.failures
        assert [one["payload"] for one in fuzz.died_plain] == ["bad"]
    with fuzzing(fine, dies) as fuzz:
        fuzz.also_plain = True
        fuzz.batch(hostile(b"good", b"bad"))
        assert [(one["payload"], one["ours"]) for one in fuzz.died_plain] == [("bad", 400)]


def test_suspects_that_do_no_harm_are_let_go() -> None:
    toy = Toy("orthrus", fine)
    found = find_culprits(toy, hostile(b"good", b"bad"), 2.0)
    toy.stop()
    assert found.culprits == []


def test_an_error_within_a_stream_counts() -> None:
    assert Outcome(200, 'data: {"error": {"code": 500}}').is_server_error
    assert not Outcome(200, 'data: {"error": {"code": 400}}').is_server_error
    assert Outcome(503).is_server_error and not Outcome(422).is_server_error


def test_nobody_there_is_no_answer() -> None:
    outcome = send("http://127.0.0.1:9", hostile(b"x")[0], 1.0)
    assert outcome.status == 0 and not outcome.timed_out
