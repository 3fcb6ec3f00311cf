"""Loads a server in a closed loop, and reads what it wrote down meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp

from benchmarks.load.figures import Result, parse
from benchmarks.load.recorder import control_file
from benchmarks.load.traffic import Request

# Requests in flight at which new ones are sent, as a share of the concurrency.
REFILL = 0.75
# Of a server, in the JSON.
SETTINGS = (
    *("attention_backend", "dtype", "quantization", "kv_cache_dtype", "page_size", "tp_size"),
    *("mem_fraction_static", "max_total_tokens", "max_running_requests", "chunked_prefill_size"),
    *("disable_overlap_schedule", "speculative_algorithm", "speculative_num_draft_tokens"),
)
_TIMEOUT = aiohttp.ClientTimeout(total=600)


@dataclass(frozen=True)
class Side:
    """A server that writes down its results.

    Attributes:
        records: the file that it appends to.
        start_up_seconds: until it answered; None if it was started elsewhere.
    """

    url: str
    records: Path
    start_up_seconds: float | None = None

    def set_width(self, width: int | None) -> None:
        """Of all rounds from the second result on; None for the controller's choice."""
        control_file(self.records).write_text("" if width is None else str(width))

    def describe(self) -> dict[str, Any]:
        """What tells this server from others: settings as SGLang resolved them, and its start-up time."""
        with urlopen(f"{self.url}/server_info", timeout=60) as reply:
            info = json.load(reply)
        return {key: info.get(key) for key in SETTINGS} | {"start_up_seconds": self.start_up_seconds}

    def since(self, offset: int) -> list[Result]:
        """Results behind so many bytes of the file."""
        if not self.records.exists():
            return []
        with self.records.open("rb") as file:
            file.seek(offset)
            return [parse(json.loads(line)) for line in file.read().splitlines()]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.records.stat().st_size if self.records.exists() else 0


async def refilled(
    side: Side, requests: Sequence[Request], concurrency: int
) -> tuple[list[list[int]], float, list[Result]]:
    """Send so many at a time; when a quarter of them are answered, send as many new ones at once.

    So a batch has requests of every age, as under a steady load, and yet rounds follow rounds without prefills between.

    Returns: see `closed_loop`.
    """
    async with _session() as session:
        await _prepare(session, side)
        offset, started = side.size, time.perf_counter()
        tasks: list[asyncio.Task[list[int]]] = []
        running: set[asyncio.Task[list[int]]] = set()
        while len(tasks) < len(requests):
            for request in requests[len(tasks) : len(tasks) + concurrency - len(running)]:
                tasks.append(asyncio.create_task(_ask(session, side, request)))
                running.add(tasks[-1])
            while len(running) > refill_at(concurrency):
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        answers = await asyncio.gather(*tasks)
    return answers, time.perf_counter() - started, side.since(offset)


def refill_at(concurrency: int) -> int:
    """Requests in flight at which new ones are sent."""
    return min(concurrency - 1, int(concurrency * REFILL))


async def closed_loop(
    side: Side, requests: Sequence[Request], concurrency: int
) -> tuple[list[list[int]], float, list[Result]]:
    """Send all, so many at a time, to an empty cache; one that is answered is replaced at once.

    Returns:
        The answers' ids in the order of the requests, the seconds that they took, and the server's results.
    """
    answers: list[list[int]] = [[]] * len(requests)
    queue = iter(enumerate(requests))

    async def work(session: aiohttp.ClientSession) -> None:
        for number, request in queue:
            answers[number] = await _ask(session, side, request)

    async with _session() as session:
        await _prepare(session, side)
        offset, started = side.size, time.perf_counter()
        await asyncio.gather(*(work(session) for _ in range(concurrency)))
    return answers, time.perf_counter() - started, side.since(offset)


async def in_steps(side: Side, requests: Iterable[Request], steps: Sequence[tuple[float, int]]) -> list[Result]:
    """The server's results while the number of requests in flight changes.

    steps: (seconds, requests in flight), one after another. Requests that run when their number falls are answered.
    """
    queue = iter(requests)
    wanted = 0

    async def work(session: aiohttp.ClientSession, number: int) -> None:
        while number < wanted:
            await _ask(session, side, next(queue))

    async with _session() as session:
        await _prepare(session, side)
        offset = side.size
        running: dict[int, asyncio.Task[None]] = {}
        for seconds, wanted in steps:
            for number in range(wanted):
                if number not in running or running[number].done():
                    running[number] = asyncio.create_task(work(session, number))
            await asyncio.sleep(seconds)
        wanted = 0
        await asyncio.gather(*running.values())
    return side.since(offset)


async def _prepare(session: aiohttp.ClientSession, side: Side) -> None:
    """The cache is empty, and a width that was written down is in force."""
    async with session.post(f"{side.url}/flush_cache?timeout=30") as reply:
        reply.raise_for_status()
    await _ask(session, side, Request("start", (5, 6), {"max_new_tokens": 4, "ignore_eos": True}))


async def _ask(session: aiohttp.ClientSession, side: Side, request: Request) -> list[int]:
    name = f"{request.kind}-{uuid.uuid4().hex}"
    async with session.post(f"{side.url}/generate", json=request.body(name)) as reply:
        reply.raise_for_status()
        found = await reply.json()
    ids: list[int] = found["output_ids"]
    return ids


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=_TIMEOUT, connector=aiohttp.TCPConnector(limit=0))
