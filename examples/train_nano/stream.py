"""A steady, ordered stream of training batches, made by worker processes while the accelerator computes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue as ProcessQueue
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from examples.train_nano.pack import Rows, concatenate, train_rows
from examples.train_nano.tokenizer import load_tokenizer

_CHUNKS_AHEAD = 12
_BATCHES_AHEAD = 8


class Place(NamedTuple):
    """Where the stream continues: the next chunk, and how many of its rows are already used."""

    chunk: int = 0
    row: int = 0


class Batch(NamedTuple):
    """Rows for one step and the place after them."""

    rows: Rows
    after: Place


def _work(queue: ProcessQueue[Rows], tokenizer_dir: Path, seed: int, first: int, stride: int, length: int) -> None:
    """Worker process: every `stride`-th chunk, for ever (a daemon, ended with its parent)."""
    tokenizer = load_tokenizer(tokenizer_dir)
    chunk = first
    while True:
        queue.put(train_rows(seed, chunk, tokenizer, length))
        chunk += stride


class RowStream:
    """Batches of packed rows in an order that depends on the seed alone, not on the number of workers.

    Start it before the first use of the accelerator: workers are forked.
    """

    def __init__(
        self, tokenizer_dir: Path, seed: int, batch_rows: int, length: int, num_workers: int, start: Place
    ) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.waited = 0.0
        self._batch_rows = batch_rows
        self._start = start
        self._tokenizer_dir, self._seed, self._length = tokenizer_dir, seed, length
        self._ready: Queue[Batch] = Queue(_BATCHES_AHEAD)
        self._queues: list[ProcessQueue[Rows]] = []
        self._processes: list[Any] = []
        context = multiprocessing.get_context("fork")
        for worker in range(num_workers):
            queue: ProcessQueue[Rows] = context.Queue(_CHUNKS_AHEAD)
            arguments = (queue, tokenizer_dir, seed, start.chunk + worker, num_workers, length)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._queues.append(queue)
            self._processes.append(process)
        self._batches = self._cut()
        if num_workers:
            threading.Thread(target=self._fill, daemon=True).start()

    def _chunks(self) -> Iterator[Rows]:
        if self._queues:
            turn = 0
            while True:
                yield self._queues[turn % len(self._queues)].get()
                turn += 1
        tokenizer = load_tokenizer(self._tokenizer_dir)
        chunk = self._start.chunk
        while True:
            yield train_rows(self._seed, chunk, tokenizer, self._length)
            chunk += 1

    def _cut(self) -> Iterator[Batch]:
        """Chunks cut into batches of equal size."""
        chunk, used = self._start
        parts: list[Rows] = []
        missing = self._batch_rows
        for rows in self._chunks():
            while used < rows.count:
                part = rows.part(used, used + missing)
                parts.append(part)
                used += part.count
                missing -= part.count
                if not missing:
                    yield Batch(concatenate(parts), Place(chunk, used))
                    parts, missing = [], self._batch_rows
            chunk, used = chunk + 1, 0

    def _fill(self) -> None:
        for batch in self._batches:
            self._ready.put(batch)

    def next(self) -> Batch:
        """The next batch; time spent waiting for workers adds to `waited` (seconds)."""
        if not self._queues:
            return next(self._batches)
        start = time.monotonic()
        batch = self._ready.get()
        self.waited += time.monotonic() - start
        return batch

    def close(self) -> None:
        """Ends the workers."""
        for process in self._processes:
            process.terminate()
