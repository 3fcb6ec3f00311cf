"""Asks one SGLang server, and tells the page what comes as it comes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp

from sglang_orthrus.cli.play.answer import Answer, accepted_ids, own_texts
from sglang_orthrus.cli.play.counters import grammar_drafts, since
from sglang_orthrus.cli.play.request import Question
from sglang_orthrus.cli.play.words import blamed_field, error_words

Event = dict[str, Any]

# A chunk of a stream is one line, with all the text and ids so far.
_READ_BUFFER = 2**21
_DATA = b"data: "
_END = b"[DONE]"


class UpstreamError(Exception):
    """A server refused a request, or did not answer. The message is for people."""


def session() -> aiohttp.ClientSession:
    """For all requests to the servers. An answer may take as long as it likes; a server that is gone is noticed."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    # SGLang closes a connection that was idle for five seconds. A request on it just then would be lost.
    connector = aiohttp.TCPConnector(force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=_READ_BUFFER)


async def answer(
    http: aiohttp.ClientSession, url: str, question: Question, has_metrics: bool
) -> AsyncGenerator[Event, None]:
    """The events of one answer: `prompt`, `round` as often as a chunk comes, `end`, `marks`; or `error`, which is last.

    Times are in milliseconds since the request for the answer was sent, and taken here rather than in the browser.
    Whoever stops reading ends the request: its connection is closed, and SGLang aborts it.
    """
    try:
        tokenized = await _post(http, f"{url}/tokenize", question.tokenize_body())
        yield {"event": "prompt", "tokens": tokenized["count"]}
        before = await _drafts(http, url) if has_metrics and question.has_schema else None
        collected = Answer()
        started = time.monotonic()
        async for chunk in _chunks(http, f"{url}/generate", question.generate_body(tokenized["tokens"])):
            if "error" in chunk:
                raise UpstreamError(error_words(chunk["error"]))
            added = collected.take(chunk)
            if collected.finish_reason.get("type") == "abort":
                # Its one token is a placeholder.
                raise UpstreamError(error_words(collected.finish_reason))
            yield {"event": "round", "ids": added.ids, "text": added.text, "ms": 1e3 * (time.monotonic() - started)}
        if not collected.finish_reason:
            raise UpstreamError("the stream ended before the answer did: the server stopped, or dropped the request")
        yield end_of(collected)
        yield await _marks(http, url, collected, before)
    except UpstreamError as error:
        message = str(error)
        yield {"event": "error", "message": message, "field": blamed_field(message)}
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        message = f"the server at {url} does not answer: {error or type(error).__name__}"
        yield {"event": "error", "message": message, "field": None, "lost": True}


def end_of(collected: Answer) -> Event:
    """What the last chunk says."""
    drafts = collected.drafts
    return {
        "event": "end",
        "reason": collected.finish_reason["type"],
        "tokens": collected.num_tokens,
        "rounds": drafts and drafts.rounds,
        "accepted": drafts and drafts.accepted,
        "proposed": drafts and drafts.proposed,
    }


async def _marks(http: aiohttp.ClientSession, url: str, collected: Answer, before: Counter[str] | None) -> Event:
    """Which text is the autoregressive view's own, and what the grammar made of drafts. Asked for after the clock."""
    ids = accepted_ids(collected)
    own = None
    if ids is not None:
        decoded = await _post(http, f"{url}/detokenize", {"tokens": ids})
        own = own_texts(collected.rounds, decoded["text"])
    grammar = None if before is None else since(before, await _drafts(http, url) or Counter())
    return {"event": "marks", "own": own, "grammar": grammar}


async def _drafts(http: aiohttp.ClientSession, url: str) -> Counter[str] | None:
    async with http.get(f"{url}/metrics") as response:
        return grammar_drafts(await response.text()) if response.ok else None


async def _post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
    async with http.post(url, json=body) as response:
        return await _checked(response)


async def _checked(response: aiohttp.ClientResponse) -> Any:
    """The JSON of an answer that is not an error."""
    text = await response.text()
    try:
        decoded = json.loads(text)
    except ValueError:
        decoded = text or response.reason
    if response.status == 401:
        raise UpstreamError("the server asks for an API key, which this page can't send")
    if not response.ok:
        raise UpstreamError(error_words(decoded))
    return decoded


async def _chunks(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with http.post(url, json=body) as response:
        if not response.ok:
            await _checked(response)
        async for line in response.content:
            data = line.removeprefix(_DATA).strip()
            if data == _END:
                return
            if data:
                yield json.loads(data)
