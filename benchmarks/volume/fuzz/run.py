"""Hostile requests to every interface that generates: no 5xx that plain SGLang does not give, no dead or silent server.

    python -m benchmarks.volume.fuzz [--requests 10000] [--seed 0] [--in-flight 16]
    python -m benchmarks.volume.fuzz --requests 1000 --own-only --model /tmp/wide-8b --results fuzz-h100.json \\
        --server-arg="--mem-fraction-static 0.4"

Half of the requests come from generators of our own (`fuzz_requests`), the rest from schemathesis, which reads the
server's OpenAPI schema, and from hypothesis; `--own-only` needs neither. After each batch of 100 a plain request has
to be answered within a second; if it is late, plain SGLang gets the same batch, and both times are reported. Every
5xx and every request that got no answer in time goes to plain SGLang, too. A server that dies is restarted, and the
requests that were on the way are sent one by one until the guilty one is found. The exit status is 1 on failures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import requests
import torch

from benchmarks.common.pool import PoolError, wait_until_idle
from benchmarks.common.provenance import RESULTS, provenance
from benchmarks.common.servers import Side, Sides, add_arguments, resident_mib, sides_of
from benchmarks.volume.fuzz.client import (
    TIMEOUT_SECONDS,
    Autopsy,
    Outcome,
    accepts,
    clear,
    ends,
    find_culprits,
    probe,
    send,
    send_all,
)
from benchmarks.volume.fuzz.requests import Hostile, request
from benchmarks.volume.soak.report import percentile, write

BATCH = 100
ON_TIME_SECONDS = 1.0
_FIELDS_KEPT = 300
# A request that is slow, not stuck, is answered in this many times the limit once it is alone.
_PATIENCE = 5


@dataclass
class Fuzz:
    """The state of a run.

    Attributes:
        also_plain: whether plain SGLang gets every batch, to find what it does not survive.
        deadly: kinds of requests that ended a server; not sent again.
    """

    sides: Sides
    in_flight: int
    timeout: float = TIMEOUT_SECONDS
    also_plain: bool = False
    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    died_plain: list[dict[str, Any]] = field(default_factory=list)
    plain_too: list[dict[str, Any]] = field(default_factory=list)
    timeouts: list[dict[str, Any]] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    late: list[dict[str, Any]] = field(default_factory=list)
    deadly: set[str] = field(default_factory=set)
    skipped: int = 0
    memory: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def batch(self, requests_: list[Hostile]) -> list[Hostile]:
        """Send a batch, look after the server, and judge the outcomes. What a death kept from being sent comes back."""
        batch = [one for one in requests_ if one.kind not in self.deadly]
        self.skipped += len(requests_) - len(batch)
        side = self.sides.orthrus
        outcomes = send_all(side, batch, self.in_flight, self.timeout)
        seconds = probe(side)
        clear(side)
        pairs = [(one, outcome) for one, outcome in zip(batch, outcomes, strict=True) if outcome.sent]
        self.sent += len(pairs)
        self.sources.update(one.source for one, _ in pairs)
        self.statuses.update(
            str(outcome.status or ("timeout" if outcome.timed_out else "none")) for _, outcome in pairs
        )
        if seconds is None:
            self._died(side, [one for one, outcome in pairs if outcome.status == 0 or outcome.is_server_error])
        else:
            self._on_time(seconds, batch)
            for one, outcome in pairs:
                self._judge(one, outcome)
        if self.also_plain and self.sides.plain is not None:
            self._plain_alone(self.sides.plain, batch)
        self.memory.append((self.sent, resident_mib(side.url)))
        return [one for one, outcome in zip(batch, outcomes, strict=True) if not outcome.sent]

    def _judge(self, one: Hostile, outcome: Outcome) -> None:
        if outcome.timed_out:
            self._compare(one, outcome, self.timeouts)
        elif outcome.is_server_error or outcome.status == 0:
            self._compare(one, outcome, self.plain_too)

    def _compare(self, one: Hostile, outcome: Outcome, excused: list[dict[str, Any]]) -> None:
        """Ask again, alone; and plain SGLang. What it does not do is a failure."""
        record = one.as_json() | {
            "status": outcome.status,
            "answer": outcome.text,
            "seconds": round(outcome.seconds, 2),
        }
        is_dead, again = ends(self.sides.orthrus, one, _PATIENCE * self.timeout)
        record["alone"] = "ends the server" if is_dead else again.status or again.text
        plain = self.sides.plain
        if plain is None:
            self._fail("5xx or no answer", record)
            return
        died, theirs = ends(plain, one, self.timeout)
        record["plain"] = theirs.status or theirs.text
        if died:
            self.died_plain.append(record)
        if is_dead:
            self.deadly.add(one.kind)
            self._fail("ends the server", record)
        elif outcome.timed_out and not again.timed_out:
            self.timeouts.append(record)  # its neighbours held it up, or it them: those show by themselves
        elif died or theirs.is_server_error or theirs.status == 0:
            excused.append(record)
        else:
            self._fail("no answer in time" if outcome.timed_out else "5xx", record)

    def _died(self, side: Side, suspects: list[Hostile]) -> None:
        found: Autopsy = find_culprits(side, suspects, self.timeout)
        if not found.culprits:
            nobody = {"error": found.error, "suspects": [one.as_json() for one in suspects]}
            self._fail("the server died or fell silent, and no request alone repeats it", nobody)
        for one in found.culprits:
            self.deadly.add(one.kind)
            record: dict[str, Any] = one.as_json() | {"error": found.error, "alone": found.alone}
            if self.sides.plain is not None:
                died, theirs = ends(self.sides.plain, one, self.timeout)
                record["plain"] = "dies, too" if died else theirs.status or theirs.text
                if died:
                    self.died_plain.append(record | {"error": self.sides.plain.last_error()})
            self._fail("ends the server", record)

    def _on_time(self, seconds: float, batch: list[Hostile]) -> None:
        self.probes.append(seconds)
        if seconds <= ON_TIME_SECONDS:
            return
        record: dict[str, Any] = {"first": batch[0].number if batch else None, "seconds": round(seconds, 3)}
        plain = self.sides.plain
        if plain is not None:
            send_all(plain, batch, self.in_flight, self.timeout)
            theirs = probe(plain)
            record["plain_seconds"] = None if theirs is None else round(theirs, 3)
            if theirs is None:
                plain.start()
        self.late.append(record)

    def _plain_alone(self, plain: Side, batch: list[Hostile]) -> None:
        """What plain SGLang does not survive, whatever ORTHRUS makes of it."""
        outcomes = send_all(plain, batch, self.in_flight, self.timeout)
        if probe(plain) is not None:
            clear(plain)
            return
        pairs = zip(batch, outcomes, strict=True)
        found = find_culprits(plain, [one for one, out in pairs if out.sent and out.status in (0, 500)], self.timeout)
        for one in found.culprits:
            ours = send(self.sides.orthrus.url, one, self.timeout)
            record = one.as_json() | {"error": found.error, "alone": found.alone, "ours": ours.status or ours.text}
            self.died_plain.append(record | {"ours_says": ours.text[:300]})
            self.deadly.add(one.kind)

    def _fail(self, what: str, record: dict[str, Any]) -> None:
        print(f"failure: {what}: {str(record)[:600]}", file=sys.stderr, flush=True)
        self.failures.append({"what": what} | record)

    def report(self, seconds: float, seed: int) -> dict[str, Any]:
        """The result as JSON."""
        slower = [one for one in self.late if one.get("plain_seconds", 0.0) is not None]
        return {
            "requests": self.sent,
            "failures": len(self.failures),
            "seconds": round(seconds, 1),
            "seed": seed,
            "in_flight": self.in_flight,
            "sources": dict(self.sources),
            "statuses": dict(sorted(self.statuses.items())),
            "skipped_since_deadly": self.skipped,
            "starts": {side.name: side.starts for side in self.sides.all},
            "plain_request_after_a_batch": {
                "batches": len(self.probes),
                "p50_seconds": percentile(self.probes, 0.5),
                "max_seconds": max(self.probes, default=None),
                "late": self.late,
                "later_than_plain": sum(one["seconds"] > 1.5 * one.get("plain_seconds", 0.0) for one in slower),
            },
            "pool_at_the_end": self._pool(),
            "resident_mib": self.memory[:: max(1, len(self.memory) // 40)],
            "failed": self.failures[:_FIELDS_KEPT],
            "died_plain": self.died_plain[:_FIELDS_KEPT],
            "plain_too": self.plain_too[:_FIELDS_KEPT],
            "timeouts": self.timeouts[:_FIELDS_KEPT],
            "commands": {side.name: side.server.command for side in self.sides.all if side.server is not None},
            "provenance": provenance(),
        }

    def _pool(self) -> Any:
        try:
            found = wait_until_idle(self.sides.orthrus.url, patience=15.0)
            return {name: found[name] for name in ("num_used_tokens", "max_total_num_tokens")}
        except (PoolError, requests.RequestException) as error:
            return str(error)


def stream(spec: dict[str, Any] | None, seed: int, count: int) -> Iterator[Hostile]:
    """Requests of all sources, shuffled; `spec` is the OpenAPI schema, None for our own generators alone."""
    if spec is None:
        yield from (request(seed, number) for number in range(count))
        return
    from benchmarks.volume.fuzz import schema as fuzz_schema

    schemathesis_share, any_share = count * 3 // 20, count // 10
    own = count - schemathesis_share - any_share
    found = [request(seed, number) for number in range(own)]
    found += fuzz_schema.from_schema(spec, seed, schemathesis_share, own)
    found += fuzz_schema.any_json(seed, count - len(found), len(found))
    Random(seed).shuffle(found)
    yield from found


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--requests", type=int, default=10_000, help="%(default)s by default")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds until a client leaves")
    parser.add_argument("--own-only", action="store_true", help="without hypothesis and schemathesis")
    parser.add_argument("--also-plain", action="store_true", help="send all to plain SGLang: what it does not survive")
    return parser.parse_args()


def main() -> int:
    """Run, write the JSON, and return 1 on failures."""
    arguments = parse()
    name = f"fuzz-{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    out: Path = arguments.results or RESULTS / name
    with sides_of(arguments) as sides:
        fuzz = Fuzz(sides, arguments.in_flight, arguments.timeout, arguments.also_plain)
        spec = None if arguments.own_only else requests.get(f"{sides.orthrus.url}/openapi.json", timeout=60).json()
        result = run(fuzz, stream(spec, arguments.seed, arguments.requests), arguments.seed, out)
    print(f"{result['requests']} requests, {result['failures']} failures: {out}")
    return 1 if result["failures"] else 0


def run(fuzz: Fuzz, hostile: Iterator[Hostile], seed: int, out: Path | None) -> dict[str, Any]:
    """All of them in batches; the result is written after each."""
    started = time.monotonic()
    result = fuzz.report(0.0, seed)
    unsent: list[Hostile] = []
    while batch := unsent + list(islice(hostile, BATCH - len(unsent))):
        unsent = fuzz.batch(batch)
        result = fuzz.report(time.monotonic() - started, seed)
        if out is not None:
            write(result, out)
        print(
            f"{fuzz.sent} requests, {len(fuzz.failures)} failures, probe {fuzz.probes[-1:]}",
            file=sys.stderr,
            flush=True,
        )
        if not accepts(fuzz.sides.orthrus):
            print("the server is gone, and it was started elsewhere", file=sys.stderr)
            break
    return result
