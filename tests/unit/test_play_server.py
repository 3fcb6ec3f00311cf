"""The page's server between a browser and a stand-in for SGLang."""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from sglang_orthrus.cli.play.app import MOST_BYTES, PAGE, SIDES, application
from sglang_orthrus.cli.play.arguments import add_arguments
from sglang_orthrus.cli.play.run import NO_PLAIN, checkpoint_folder, following, run
from sglang_orthrus.cli.play.sides import ORTHRUS, PLAIN, Side, Stage, advice, follow
from sglang_orthrus.cli.play.upstream import session
from sglang_orthrus.cli.server import free_port

Client = TestClient[web.Request, web.Application]
INFO = {"model_path": "/models/nano", "speculative_algorithm": "ORTHRUS", "speculative_num_draft_tokens": 32}
END = {
    **{"finish_reason": {"type": "stop"}, "completion_tokens": 4},
    **{"spec_verify_ct": 1, "spec_num_correct_drafts": 2, "spec_num_proposed_drafts": 31},
}


class StandIn:
    """A server that answers as SGLang does; `endless` ones never come to an end."""

    def __init__(self, refusal: dict[str, Any] | None = None, endless: bool = False) -> None:
        self.refusal, self.endless = refusal, endless
        self.asked: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.num_scraped = 0
        app = web.Application()
        app.add_routes(
            [
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.post("/generate", self.generate),
                web.get("/metrics", self.metrics),
            ]
        )
        self.server = TestServer(app, handler_cancellation=True)

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": [1, 2, 3], "count": 3})

    async def detokenize(self, request: web.Request) -> web.Response:
        lists = (await request.json())["tokens"]
        return web.json_response({"text": ["".join(f" t{token}" for token in ids) for ids in lists]})

    async def metrics(self, request: web.Request) -> web.Response:
        self.num_scraped += 1
        return web.Response(text=f'sglang_orthrus:grammar_drafts_total{{change="repaired"}} {4 * self.num_scraped}.0\n')

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            if self.refusal:
                await self.send(response, {"text": "!", "output_ids": [0], "meta_info": self.refusal})
            else:
                await self.send(response, {"text": " t5", "output_ids": [5], "meta_info": {"completion_tokens": 1}})
                while self.endless:
                    await asyncio.sleep(0.01)
                text, ids = " t5 t6 t7 t8", [5, 6, 7, 8]
                await self.send(response, {"text": text, "output_ids": ids, "meta_info": END})
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise
        return response

    @staticmethod
    async def send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def ready(url: str) -> Side:
    side = Side(ORTHRUS)
    side.url = url
    side.tell(Stage.READY, model="nano", metrics=True)
    return side


def served(test: Callable[[Client, StandIn], Awaitable[None]], **options: Any) -> None:
    """Run a test with a browser's session and the stand-in."""

    async def with_servers() -> None:
        stand_in = StandIn(**options)
        async with stand_in.server:
            sides = {ORTHRUS: ready(str(stand_in.server.make_url(""))), PLAIN: Side(PLAIN, Stage.ABSENT, NO_PLAIN)}
            page = TestServer(application(sides), handler_cancellation=True)
            async with TestClient(page) as client:
                await test(client, stand_in)

    asyncio.run(with_servers())


async def events_of(client: Client, **body: Any) -> list[dict[str, Any]]:
    async with client.post("/api/answer/orthrus", json={"prompt": "Hi", **body}) as response:
        assert response.status == 200
        return [json.loads(line) for line in (await response.text()).splitlines()]


def test_an_answer_is_streamed_round_by_round() -> None:
    async def test(client: Client, stand_in: StandIn) -> None:
        prompt, first, second, end, marks = await events_of(client, max_tokens=9)
        assert prompt == {"event": "prompt", "tokens": 3}
        assert (first["ids"], first["text"]) == ([5], " t5") and (second["ids"], second["text"]) == (
            [6, 7, 8],
            " t6 t7 t8",
        )
        assert 0 <= first["ms"] <= second["ms"]
        assert end == {
            **{"event": "end", "reason": "stop", "tokens": 4},
            **{"rounds": 1, "accepted": 2, "proposed": 31},
        }
        assert marks == {"event": "marks", "own": [" t5", " t8"], "grammar": None}
        assert stand_in.asked[0]["sampling_params"] == {"temperature": 0, "max_new_tokens": 9}
        assert stand_in.num_scraped == 0

    served(test)


def test_with_a_schema_the_counters_are_read_before_and_after() -> None:
    async def test(client: Client, stand_in: StandIn) -> None:
        assert (await events_of(client, schema="{}"))[-1]["grammar"] == {"none": 0, "repaired": 4, "forced": 0}

    served(test)


def test_a_schema_that_the_server_refuses_is_an_error_beside_its_box() -> None:
    async def test(client: Client, stand_in: StandIn) -> None:
        _, error = await events_of(client, schema="{")
        assert error == {"event": "error", "message": "Failed to compile json grammar: no end", "field": "schema"}

    reason = {"type": "abort", "message": "Failed to compile json grammar: no end", "status_code": 400}
    served(test, refusal={"finish_reason": reason, "completion_tokens": 1})


def test_a_browser_that_leaves_ends_the_request() -> None:
    async def test(client: Client, stand_in: StandIn) -> None:
        response = await client.post("/api/answer/orthrus", json={"prompt": "Hi"})
        await response.content.readline()
        await response.content.readline()
        response.close()
        await asyncio.wait_for(stand_in.left.wait(), 30)

    served(test, endless=True)


def test_a_server_that_is_gone_is_noticed() -> None:
    async def test(client: Client, stand_in: StandIn) -> None:
        side = client.app[SIDES][ORTHRUS]
        side.url = f"http://127.0.0.1:{free_port()}"
        (error,) = await events_of(client)
        assert error["event"] == "error" and "does not answer" in error["message"] and side.is_unreachable.is_set()

    served(test)


def test_what_the_page_may_not_ask_for() -> None:
    async def test(client: Client, stand_in: StandIn) -> None:
        url = "/api/answer/orthrus"
        assert (await client.post(url, json={"prompt": ""})).status == 400
        assert (await client.post(url, data=b"{", headers={"Content-Type": "application/json"})).status == 400
        assert (await client.post(url, json={"prompt": "x" * MOST_BYTES})).status == 413
        assert (await client.post("/api/answer/plain", json={"prompt": "Hi"})).status == 503
        assert (await client.post("/api/answer/other", json={"prompt": "Hi"})).status == 404
        for path in ("/server.py", "/../app.py", "/%2e%2e/app.py", "/page/index.html"):
            assert (await client.get(path)).status == 404
        assert not stand_in.asked

    served(test)


def test_pages_of_other_sites_are_refused() -> None:
    async def test(client: Client, stand_in: StandIn) -> None:
        url, body = "/api/answer/orthrus", {"prompt": "Hi"}
        assert (await client.post(url, json=body, headers={"Origin": "http://evil.example"})).status == 403
        assert (await client.get("/", headers={"Host": "evil.example"})).status == 403
        assert (await client.post(url, data=json.dumps(body), headers={"Content-Type": "text/plain"})).status == 415
        assert not stand_in.asked

    served(test)


def test_every_answer_forbids_what_does_not_come_from_here() -> None:
    async def test(client: Client, stand_in: StandIn) -> None:
        for path in ("/", "/main.js", "/api/state", "/nowhere"):
            policy = (await client.get(path)).headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
        state = await (await client.get("/api/state")).json()
        assert state["orthrus"]["stage"] == "ready" and state["plain"]["words"] == NO_PLAIN

    served(test)


def test_the_page_is_whole_and_loads_nothing_from_elsewhere() -> None:
    names = {file.name for file in PAGE.iterdir()}
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350 or file.suffix == ".json"
        assert "https://" not in text and "innerHTML" not in text and " style=" not in text
        for quote in ('from "./', 'href="', 'src="'):
            for part in text.split(quote)[1:]:
                target = part.split('"')[0]
                assert target.startswith("#") or target in names, f"{file.name}: {target}"


def test_a_running_server_is_followed_and_advice_names_what_does_not_fit() -> None:
    assert advice(ORTHRUS, INFO) == "" and advice(PLAIN, {"stream_interval": 1}) == ""
    assert "without --speculative-algorithm ORTHRUS" in advice(ORTHRUS, {})
    assert "NGRAM" in advice(PLAIN, {"speculative_algorithm": "NGRAM"})
    assert "--stream-interval" in advice(ORTHRUS, {**INFO, "stream_interval": 8})


def test_a_server_that_does_not_answer_is_asked_again_until_it_does() -> None:
    async def test() -> None:
        app, port = web.Application(), free_port()

        async def info(request: web.Request) -> web.Response:
            return web.json_response(INFO)

        app.router.add_get("/server_info", info)
        side, stop = Side(ORTHRUS), threading.Event()
        watching = asyncio.create_task(asyncio.to_thread(follow, side, f"http://127.0.0.1:{port}", stop))
        try:
            await until(lambda: side.state()["stage"] == "unreachable")
            assert f"No SGLang server answers at http://127.0.0.1:{port}" in side.state()["words"]
            async with TestServer(app, port=port):
                await until(lambda: side.is_ready)
                assert side.state()["model"] == "nano" and side.state()["width"] == 32
        finally:
            stop.set()
            await watching

    async def until(is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not is_so():
                await asyncio.sleep(0.02)

    asyncio.run(test())


def test_without_a_plain_server_the_page_says_what_is_missing() -> None:
    (orthrus, watch), (plain, nothing) = following("http://127.0.0.1:1", None)
    assert orthrus.state()["stage"] == "starting" and watch is not None
    assert plain.state()["stage"] == "absent" and "--plain-url" in plain.state()["words"] and nothing is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["some/checkpoint", "--url", "http://127.0.0.1:1"], "leave out the checkpoint"),
        (["--plain-url", "http://127.0.0.1:1"], "--plain-url needs --url"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: list[str], words: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match=words):
        run(parser.parse_args(arguments), [])
    assert parser.parse_args(["--url", "http://127.0.0.1:1/v1/"]).url == "http://127.0.0.1:1"
    with pytest.raises(SystemExit):
        parser.parse_args(["--url", "localhost:1"])


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint directory"):
        checkpoint_folder(str(tmp_path / "nothing"))
    assert checkpoint_folder(str(tmp_path)) == tmp_path


def test_the_session_has_no_limit_on_an_answers_time() -> None:
    async def test() -> None:
        async with session() as http:
            assert isinstance(http.timeout, aiohttp.ClientTimeout) and http.timeout.total is None

    asyncio.run(test())
