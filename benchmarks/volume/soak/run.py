"""Every kind of request, mixed at random, for an hour: each answer is checked, greedy ones against plain SGLang's.

    python -m benchmarks.volume.soak [--minutes 60 | --requests N] [--seed 0] [--in-flight 16]
    python -m benchmarks.volume.soak --minutes 5 --in-flight 48 --model /tmp/wide-8b --tie-below 0.375 \\
        --server-arg="--mem-fraction-static 0.4" --results soak-h100.json --no-plain-latency

Blocks of requests go to ORTHRUS and then to plain SGLang, with the same number in flight, so that the two never
compete for a core and latencies compare on the same requests. In the middle of a block servers are paused, flushed,
asked and updated; between blocks they are idle, their memory is sampled and idle-only events follow. On a CPU the KV
pool is so small that requests are retracted. A request is a function of seed and number:
`--seed S --first NUMBER --requests 1` sends one again. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import requests
import torch

from benchmarks.common.equality import NEAR_TIE, PROMPTS_PER_EXCUSE, Divergence
from benchmarks.common.pool import PoolError, gauge, load, wait_until_idle
from benchmarks.common.provenance import RESULTS, provenance
from benchmarks.common.servers import Side, Sides, add_arguments, resident_mib, sides_of
from benchmarks.volume.soak import report as figures
from benchmarks.volume.soak.checks import Verdict, check, compare, ranked_divergence
from benchmarks.volume.soak.client import Answer, Client, Reply
from benchmarks.volume.soak.requests import ABORT_ALL, Act, Mix, Request

# As `benchmarks.parity` measured it for bf16.
BF16_NEAR_TIE = 0.375
THINKING_ARGS = ("--reasoning-parser", "qwen3")
POOL_ARGS = ("--max-total-tokens", "3072")
# Requests are admitted as if they would write 16 tokens, so that the pool fills up while they run.
OPTIMISTIC = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
_KEPT_FAILURES = 200
_IDLE_EVENTS: tuple[tuple[tuple[str, Any], ...], ...] = (
    (("/flush_cache", None),),
    (("/release_memory_occupation", {}), ("/resume_memory_occupation", {})),
    (("/update_weights_from_disk", {"model_path": ""}),),
    (),
)


@dataclass
class Run:
    """The state of a soak.

    Attributes:
        tie_below: top-2 gap below which rounding may decide.
        excuses: whether near ties are counted against a run, one in 200 requests.
        together: whether both servers are asked at once, so that latencies mean nothing.
        late_penalties: whether plain SGLang runs with overlap, so that it penalises one token late.
    """

    sides: Sides
    mix: Mix
    in_flight: int
    tie_below: float = NEAR_TIE
    excuses: bool = True
    together: bool = False
    late_penalties: bool = False
    done: list[Request] = field(default_factory=list)
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    plain_too: list[dict[str, Any]] = field(default_factory=list)
    near_ties: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    greedy: int = 0
    ended: str = ""

    def block(self, first: int, count: int) -> None:
        """Send requests to every server, and judge the replies."""
        batch = [self.mix.request(number) for number in range(first, first + count)]
        if self.together:
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda side: self._load(side, batch), self.sides.all))
        else:
            found = [self._load(side, batch) for side in self.sides.all]
        self.done += batch
        for side, replies in zip(self.sides.all, found, strict=True):
            self.replies.setdefault(side.name, []).extend(replies)
            self._between(side, first // count)
        theirs: list[Reply] | list[None] = found[1] if len(found) > 1 else [None] * len(batch)
        for request, ours, their in zip(batch, found[0], theirs, strict=True):
            self._judge(request, ours, their, found, batch)

    def _load(self, side: Side, batch: list[Request]) -> list[Reply]:
        clients = threading.local()
        dead = threading.Event()

        def send(request: Request) -> Reply:
            if dead.is_set():
                return Reply(error="not sent")
            if not hasattr(clients, "one"):
                clients.one = Client(side.url, f"{side.name}-{self.mix.seed}", side.weights)
            reply: Reply = clients.one.send(request)
            if reply.status == 0 and not side.is_alive():
                dead.set()
            return reply

        with ThreadPoolExecutor(self.in_flight) as pool:
            replies = list(pool.map(send, batch))
        if dead.is_set():
            self.ended = self.ended or f"{side.name} is dead or silent: {side.last_error()}\n{side.log_tail()}"
        return replies

    def _between(self, side: Side, number: int) -> None:
        """The server is idle: its pool must be whole, and what only an idle server does is done."""
        if self.ended:
            return
        try:
            wait_until_idle(side.url)
        except (PoolError, requests.RequestException) as error:
            self._fail(None, side, [f"{side.name}: {error}"])
            self.ended = self.ended or f"{side.name}: {error}"
            return
        self.memory.setdefault(side.name, []).append((len(self.done), resident_mib(side.url)))
        client = Client(side.url, "idle", side.weights)
        for path, body in _IDLE_EVENTS[number % len(_IDLE_EVENTS)]:
            if "weights" in path and not side.weights:
                continue
            sent = {"model_path": side.weights} if "weights" in path else body
            response = client.call("POST", path, sent)
            if response.status_code != requests.codes.ok:
                self._fail(None, side, [f"{side.name} {path}: {response.status_code} {response.text[:500]}"])

    def _judge(
        self, request: Request, ours: Reply, theirs: Reply | None, found: list[list[Reply]], batch: list[Request]
    ) -> None:
        if ours.error == "not sent" or (theirs is not None and theirs.error == "not sent"):
            return
        excused = [
            is_excused(reply, side, batch)
            for reply, side in zip((ours, theirs), found, strict=False)
            if reply is not None
        ]
        problems = [] if excused[0] else check(request, ours)
        if problems and theirs is not None and not excused[1] and check(request, theirs):
            self.plain_too.append({"problems": problems, "plain": check(request, theirs), "request": request.as_json()})
            problems = []
        statuses_ok = theirs is not None and ours.status == theirs.status == requests.codes.ok
        is_late = self.late_penalties and ("penalties" in request.kind or request.min_tokens)
        if (
            request.greedy
            and request.act != "control"
            and theirs is not None
            and statuses_ok
            and not is_late
            and not any(excused)
        ):
            self.greedy += 1
            verdict = self._compare(request, ours, theirs)
            problems += verdict.problems
            self.near_ties += [asdict(tie) | {"number": request.number} for tie in verdict.near_ties]
        if problems:
            self._fail(request, self.sides.orthrus, problems, ours, theirs)

    def _compare(self, request: Request, ours: Reply, theirs: Reply) -> Verdict:
        alone = partial(self._alone, request)
        return compare(request, ours, theirs, partial(self._divergence, alone=alone), alone, tie_below=self.tie_below)

    def _alone(self, request: Request, number: int) -> Answer:
        """Plain SGLang's answer to a request that it is sent once more, alone, with its best two tokens each."""
        assert self.sides.plain is not None
        reply = Client(self.sides.plain.url, "ranked", self.sides.plain.weights).send(_ranking(request))
        return reply.answers[number] if number < len(reply.answers) else Answer()

    def _divergence(self, number: int, expected: Any, actual: Any, alone: Callable[[int], Answer]) -> Divergence | None:
        return ranked_divergence(alone(number), expected, actual, self.tie_below)

    def _fail(
        self, request: Request | None, side: Side, problems: list[str], ours: Reply | None = None, theirs: Any = None
    ) -> None:
        print(f"failure: {request.kind if request else side.name}: {'; '.join(problems)[:400]}", file=sys.stderr)
        self.failures.append(
            {
                "problems": problems,
                "request": request.as_json() if request else None,
                "ours": asdict(ours) if ours else None,
                "plain": asdict(theirs) if theirs else None,
            }
        )

    def report(self, seconds: float) -> dict[str, Any]:
        """The result as JSON."""
        allowed = -(-self.greedy // PROMPTS_PER_EXCUSE) if self.excuses else None
        failures = len(self.failures) + bool(self.ended)
        if allowed is not None and len(self.near_ties) > allowed:
            failures += 1
        timed = (
            {}
            if self.together
            else {
                name: figures.latencies(zip(self.done, replies, strict=True)) for name, replies in self.replies.items()
            }
        )
        counted = [
            answer
            for request, reply in zip(self.done, self.replies.get("orthrus", ()), strict=False)
            if request.greedy and not reply.aborted
            for answer in reply.answers
            if answer.rounds and answer.ids
        ]
        tokens = sum(len(answer.ids or ()) - 1 for answer in counted)
        return {
            "requests": len(self.done),
            "failures": failures,
            "seconds": round(seconds, 1),
            "requests_per_hour": round(len(self.done) / max(seconds, 1e-9) * 3600),
            "compared_with_plain": self.greedy,
            "near_ties": {"allowed": allowed, "below": self.tie_below, "found": self.near_ties},
            "ended_early": self.ended,
            "seed": self.mix.seed,
            "in_flight": self.in_flight,
            "kinds": figures.kinds(self.done),
            "latency_seconds": timed,
            "tokens_per_cycle": round(tokens / max(1, sum(answer.rounds for answer in counted)), 3),
            "pool": {side.name: self._pool(side) for side in self.sides.all},
            "resident_memory": {name: figures.memory_report(samples) for name, samples in self.memory.items()},
            "failed": self.failures[:_KEPT_FAILURES],
            "plain_too": self.plain_too[:_KEPT_FAILURES],
            "last_requests": [request.as_json() for request in self.done[-2 * self.in_flight :]] if self.ended else [],
            "commands": {side.name: side.server.command for side in self.sides.all if side.server is not None},
            "provenance": provenance(),
        }

    def _pool(self, side: Side) -> dict[str, Any]:
        try:
            found = load(side.url)
            names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "max_total_num_tokens")
            return {name: found[name] for name in names} | {
                "retracted_requests": gauge(side.url, "num_retracted_requests_total")
            }
        except requests.RequestException as error:
            return {"error": str(error)}


def is_excused(reply: Reply, replies: list[Reply], batch: list[Request]) -> bool:
    """Whether an abort of everything came while it ran."""
    if not reply.aborted:
        return False
    for request, other in zip(batch, replies, strict=True):
        overlaps = other.started <= reply.started + reply.seconds and reply.started <= other.started + other.seconds
        if request.kind == ABORT_ALL and overlaps:
            return True
    return False


def _ranking(request: Request) -> Request:
    """The same request whole, with the best two tokens listed."""
    act: Act = "session" if request.act == "session" else "whole"
    if request.path == "/v1/chat/completions":
        more: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    elif request.path == "/v1/completions":
        more = {"logprobs": 2}
    else:
        more = {"return_logprob": True, "top_logprobs_num": 2}
    return replace(request, body=request.body | more, act=act)


def processor() -> str:
    """SGLang's processor that forbids tokens, serialised."""
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    text: str = DisallowedTokensLogitsProcessor().to_str()
    return text


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=60.0, help="%(default)s by default")
    parser.add_argument("--requests", type=int, help="stop after so many")
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--block", type=int, default=200, help="requests between two idle moments")
    parser.add_argument("--tie-below", type=float, help=f"{NEAR_TIE} on a CPU, {BF16_NEAR_TIE} on a GPU by default")
    parser.add_argument("--no-plain-latency", action="store_true", help="ask both servers at once; no latencies")
    return parser.parse_args()


def main() -> int:
    """Run, write the JSON, and return 1 if anything failed."""
    arguments = parse()
    on_gpu = torch.cuda.is_available()
    out = arguments.results or RESULTS / f"soak-{'gpu' if on_gpu else 'cpu'}.json"
    args = THINKING_ARGS if on_gpu else (*THINKING_ARGS, *POOL_ARGS)
    tie_below = arguments.tie_below or (BF16_NEAR_TIE if on_gpu else NEAR_TIE)
    started = time.monotonic()
    with sides_of(arguments, args, None if on_gpu else OPTIMISTIC) as sides:
        run = Run(
            sides, Mix(arguments.seed, processor=processor()), arguments.in_flight, tie_below, tie_below <= NEAR_TIE
        )
        run.together = arguments.no_plain_latency
        result = soak(run, arguments.first, arguments.requests, arguments.minutes * 60, arguments.block, out)
    print(f"{result['requests']} requests, {result['failures']} failures, {time.monotonic() - started:.0f} s: {out}")
    return 1 if result["failures"] else 0


def soak(run: Run, first: int, count: int | None, seconds: float, block: int, out: Path | None) -> dict[str, Any]:
    """Blocks until the time is over, or so many requests were sent."""
    started = time.monotonic()
    result = run.report(0.0)
    while not run.ended and (count is None or len(run.done) < count) and time.monotonic() - started < seconds:
        size = block if count is None else min(block, count - len(run.done))
        run.block(first + len(run.done), size)
        result = run.report(time.monotonic() - started)
        if out is not None:
            figures.write(result, out)
        print(
            f"{result['requests']} requests, {result['failures']} failures, {result['requests_per_hour']} an hour, "
            f"{len(run.near_ties)} near ties",
            file=sys.stderr,
            flush=True,
        )
    return result
