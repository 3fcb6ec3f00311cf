"""Sends a request of the soak and reads its answers, whole or streamed, from any of the interfaces."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests

from benchmarks.volume.soak.requests import Request

Ranked = list[list[tuple[float | None, int]]]
_SESSION_CAPACITY = 4000

# Two updates at once end SGLang's TokenizerManager.
_UPDATE = threading.Lock()
# What SGLang says while a request whose client has left still runs.
_STILL_RUNS = "the cache was not flushed because requests are still running"


@dataclass
class Answer:
    """One text of a reply. What an interface does not tell is None or empty.

    Attributes:
        ids: tokens, the end of the text included.
        finish: "stop", "length", "abort", "tool_calls"; None for a stream that was cut.
        tokens: (prompt, completion, reasoning) as the server counts them for this text.
        rounds: verify passes; 0 without speculation.
        logprobs: of the tokens; `top` and `at_ids` the listed alternatives per token.
    """

    text: str = ""
    ids: list[int] | None = None
    finish: str | None = None
    matched: Any = None
    tokens: tuple[int | None, int | None, int | None] = (None, None, None)
    rounds: int = 0
    logprobs: list[float | None] | None = None
    top: list[Any] = field(default_factory=list)
    at_ids: Ranked = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    reasoning: str = ""


@dataclass
class Reply:
    """What came back, and when.

    Attributes:
        status: HTTP; 0 if there was no HTTP answer.
        usage: (prompt, completion, reasoning) tokens of the whole reply.
        started, seconds: on the monotonic clock.
        error: what the server or the connection complained about.
    """

    status: int = 0
    answers: list[Answer] = field(default_factory=list)
    usage: tuple[int | None, int | None, int | None] | None = None
    started: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def aborted(self) -> bool:
        """Whether any text was ended by an abort. A stream that waited until then has an error and no text."""
        return "abort" in self.error.lower() or any(answer.finish == "abort" for answer in self.answers)


class Client:
    """A connection to one server. Not shared between threads.

    Args:
        label: makes request ids unique over servers and runs.
        weights: the checkpoint folder for weight updates.
        timeout: seconds without a byte after which a server counts as silent.
    """

    def __init__(self, url: str, label: str, weights: str = "", timeout: float = 300.0) -> None:
        self.url, self.label, self.weights, self.timeout = url, label, weights, timeout
        self._http = requests.Session()

    def send(self, request: Request) -> Reply:
        """The reply, in any case: what goes wrong is in `status` and `error`."""
        reply = Reply(started=time.monotonic())
        try:
            if request.act == "session":
                self._session(request, reply)
            elif request.act == "control":
                self._control(request, reply)
            elif request.act == "whole":
                self._whole(request, reply)
            else:
                self._stream(request, reply)
        except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
            reply.error = reply.error or f"{type(error).__name__}: {error}"
            reply.status = reply.status if reply.status >= requests.codes.bad else 0
        reply.seconds = time.monotonic() - reply.started
        return reply

    def call(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> requests.Response:
        """Any other HTTP request."""
        return self._http.request(method, self.url + path, json=body, timeout=timeout or self.timeout)

    def _post(self, request: Request, reply: Reply, **more: Any) -> requests.Response:
        body = request.body | more
        response = self._http.post(
            self.url + request.path, json=body, stream=bool(more.get("stream")), timeout=self.timeout
        )
        reply.status = response.status_code
        if response.status_code != requests.codes.ok:
            reply.error = response.text[:2000]
            raise requests.HTTPError(reply.error)
        return response

    def _whole(self, request: Request, reply: Reply) -> None:
        decoded = self._post(request, reply).json()
        reply.answers, reply.usage = read_whole(request.path, decoded)

    def _stream(self, request: Request, reply: Reply) -> None:
        rid = f"{self.label}-{request.number}"
        more: dict[str, Any] = {"stream": True, "rid": rid}
        if request.path != "/generate":
            more["stream_options"] = {"include_usage": True}
        events = []
        with self._post(request, reply, **more) as response:
            aborted = False
            for event in _events(response):
                events.append(event)
                if "error" in event:
                    reply.error = json.dumps(event["error"])
                came = (event.get("meta_info") or {}).get("completion_tokens", 0)
                if request.act == "cut" and came >= request.after:
                    break
                if request.act == "abort" and came >= request.after and not aborted:
                    aborted = True
                    requests.post(f"{self.url}/abort_request", json={"rid": rid}, timeout=self.timeout)
        reply.answers, reply.usage = read_stream(request.path, events)

    def _session(self, request: Request, reply: Reply) -> None:
        opened = self.call("POST", "/open_session", {"capacity_of_str_len": _SESSION_CAPACITY})
        opened.raise_for_status()
        session, rid = opened.json(), None
        for turn in request.turns:
            step = self._post(request, reply, text=turn, session_params={"id": session, "rid": rid}).json()
            rid = step["meta_info"]["id"]
            reply.answers += read_whole("/generate", step)[0]
        self.call("POST", "/close_session", {"session_id": session}).raise_for_status()

    def _control(self, request: Request, reply: Reply) -> None:
        """All steps in any case: what is paused must go on."""
        for method, path, body in request.body["steps"]:
            reply.status = max(reply.status, requests.codes.ok)
            if path != "/update_weights_from_disk":
                response = self.call(method, path, body)
            elif self.weights:
                with _UPDATE:
                    response = self.call(method, path, {"model_path": self.weights})
            else:  # a server that was started elsewhere
                continue
            busy = path == "/flush_cache" or _STILL_RUNS in response.text
            busy = busy and response.status_code == requests.codes.bad
            if response.status_code != requests.codes.ok and not busy:
                reply.error += f"{path}: {response.status_code} {response.text[:500]}"
            reply.status = max(reply.status, requests.codes.ok if busy else response.status_code)


def _events(response: requests.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines(chunk_size=None):
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


# -- reading


def read_whole(path: str, decoded: Any) -> tuple[list[Answer], Any]:
    """Answers and usage of a reply that came in one go."""
    if path == "/generate":
        return [_generated(item) for item in (decoded if isinstance(decoded, list) else [decoded])], None
    ids = (decoded.get("sglext") or {}).get("output_ids")
    answers = []
    for choice in decoded["choices"]:
        answer = Answer(finish=choice["finish_reason"], matched=choice.get("matched_stop"))
        if "message" in choice:
            message = choice["message"]
            answer.text, answer.reasoning = message.get("content") or "", message.get("reasoning_content") or ""
            answer.calls = [
                (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []
            ]
            answer.ids = ids[choice["index"]] if ids else None
        else:
            answer.text, answer.ids = choice["text"], choice.get("token_ids")
        _read_logprobs(answer, choice.get("logprobs"))
        answers.append(answer)
    return answers, _usage(decoded.get("usage"))


def read_stream(path: str, events: list[dict[str, Any]]) -> tuple[list[Answer], Any]:
    """The same, put together from the events of a stream."""
    if path == "/generate":
        last: dict[int, dict[str, Any]] = {event.get("index", 0): event for event in events if "meta_info" in event}
        return [_generated(last[index]) for index in sorted(last)], None
    answers: dict[int, Answer] = defaultdict(Answer)
    usage = None
    for event in events:
        for choice in event.get("choices", ()):
            _add_delta(answers[choice["index"]], choice)
        ids = (event.get("sglext") or {}).get("output_ids") or []
        for index, found in enumerate(ids):
            answers[index].ids = found
        usage = _usage(event.get("usage")) or usage
    return [answers[index] for index in sorted(answers)], usage


def _add_delta(answer: Answer, choice: Mapping[str, Any]) -> None:
    answer.finish = choice.get("finish_reason") or answer.finish
    answer.matched = choice.get("matched_stop") if answer.matched is None else answer.matched
    _read_logprobs(answer, choice.get("logprobs"))
    if "delta" not in choice:
        answer.text += choice["text"]
        if choice.get("token_ids"):
            answer.ids = (answer.ids or []) + choice["token_ids"]
        return
    delta = choice["delta"]
    answer.text += delta.get("content") or ""
    answer.reasoning += delta.get("reasoning_content") or ""
    for call in delta.get("tool_calls") or []:
        if call["function"].get("name"):
            answer.calls.append((call["function"]["name"], ""))
        name, arguments = answer.calls[call["index"]]
        answer.calls[call["index"]] = (name, arguments + (call["function"].get("arguments") or ""))


def _generated(item: Mapping[str, Any]) -> Answer:
    meta = item["meta_info"]
    finish = meta.get("finish_reason") or {}
    listed = meta.get("output_token_logprobs")
    return Answer(
        item["text"],
        item.get("output_ids"),
        finish.get("type"),
        finish.get("matched"),
        (meta.get("prompt_tokens"), meta.get("completion_tokens"), meta.get("reasoning_tokens")),
        meta.get("spec_verify_ct") or 0,
        None if listed is None else [entry[0] for entry in listed],
        [[(entry[0], entry[1]) for entry in row or ()] for row in meta.get("output_top_logprobs") or ()],
        [[(entry[0], entry[1]) for entry in row or ()] for row in meta.get("output_token_ids_logprobs") or ()],
    )


def _read_logprobs(answer: Answer, found: Mapping[str, Any] | None) -> None:
    """Adds what a choice or a delta tells; alternatives of the OpenAI interfaces have no ids."""
    if not found:
        return
    answer.logprobs = answer.logprobs or []
    if "content" in found:
        rows = found["content"] or []
        answer.logprobs += [row["logprob"] for row in rows]
        answer.top += [[(other["logprob"], -1) for other in row["top_logprobs"]] for row in rows]
    else:
        answer.logprobs += found["token_logprobs"]
        answer.top += [[(value, -1) for value in (row or {}).values()] for row in found.get("top_logprobs") or ()]


def _usage(found: Mapping[str, Any] | None) -> tuple[int | None, int | None, int | None] | None:
    if not found:
        return None
    return found["prompt_tokens"], found["completion_tokens"], found.get("reasoning_tokens")
