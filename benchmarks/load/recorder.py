"""An SGLang plugin for benchmarks: writes down every result of a server, and fixes the width of rounds on demand.

It works in plain SGLang, too. A server that adapts its widths can so be measured at each of them: what is written to
the control file is the width of all rounds from the next result on; empty, the controller chooses.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from pathlib import Path
from typing import IO, Any

RECORDS_ENV = "ORTHRUS_BENCHMARK_RECORDS"


def control_file(records: Path) -> Path:
    """Where the width is written."""
    return records.with_suffix(".width")


class FixedWidth:
    """Stands in for a controller: always the same width, and nothing is learnt."""

    decodes_plainly = False  # so that nobody looks for what grammars force

    def __init__(self, width: int) -> None:
        self._width = width

    def __contains__(self, key: Hashable) -> bool:
        """Nobody needs to be started."""
        return True

    def start(self, key: Hashable, request_class: Hashable, is_bursty: bool = False) -> None:
        """Nothing."""

    def add_steps(self, count: int) -> bool:
        """One step a round."""
        return False

    def forget(self, key: Hashable, num_tokens: int | None = None) -> None:
        """Nothing."""

    def plan(self, keys: Sequence[Hashable], *others: Any) -> Any:
        """The width."""
        from sglang_orthrus.round.widths import RoundWidth

        return RoundWidth(self._width, False)

    def observe(
        self, keys: Sequence[Hashable], width: int, accept_lens: Sequence[int], *others: Any, **more: Any
    ) -> Any:
        """Nothing."""
        from sglang_orthrus.round.widths import RoundResult

        return RoundResult(0, 0, 0.0, 0.0)

    def note_waited(self, seconds: float) -> None:
        """Nothing."""

    def report(self) -> str:
        """For the log."""
        return f"width {self._width}, fixed"


class Recorder:
    """Writes a line per result: [seconds, is decode, requests, width, steps, {kind: [requests, tokens]}].

    The seconds are those at which a batch had run. A request's kind is its id up to the first hyphen.
    """

    def __init__(self, records: Path) -> None:
        self._records = records
        self._control = control_file(records)
        self._file: IO[str] | None = None
        self._changed = 0
        self.width: int | None = None

    def write(self, *line: Any) -> None:
        """Append a line, and look for a new width."""
        if self._file is None:
            self._file = self._records.open("a", buffering=1)
        self._file.write(json.dumps(line) + "\n")
        changed = self._control.stat().st_mtime_ns if self._control.exists() else 0
        if changed != self._changed:
            self._changed = changed
            text = self._control.read_text().strip()
            self.width = int(text) if text else None


def register() -> None:
    """Record the results of this process's scheduler; of tensor-parallel ranks, the first one's."""
    recorder = Recorder(Path(os.environ[RECORDS_ENV]))
    clock = _Clock()
    _note_ends(clock)
    _record_results(recorder, clock)
    if os.environ.get("SGLANG_PLUGINS") is None:
        _fix_widths(recorder)


class _Clock:
    """Tells when batches had run, in seconds, after their results were taken in. Theirs is the order of their calls."""

    def __init__(self) -> None:
        self._last: Any = None
        self._at = 0.0

    def note_queued(self, scheduler: Any, result: Any) -> None:
        """A batch is queued, or part of it; the last call counts."""
        if scheduler.device == "cpu":
            result.ran_at = time.perf_counter()
            return
        result.ran_at = scheduler.device_module.Event(enable_timing=True)
        result.ran_at.record(scheduler.forward_stream if scheduler.enable_overlap else None)

    def seconds(self, result: Any) -> float:
        """When it had run, since some moment."""
        at = result.ran_at
        if isinstance(at, float):
            return at
        at.synchronize()
        # From one to the next: a device tells milliseconds in single precision.
        self._at += 0.0 if self._last is None else self._last.elapsed_time(at) / 1e3
        self._last = at
        return self._at


def _note_ends(clock: _Clock) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    run, sample = Scheduler.run_batch, Scheduler.launch_batch_sample_if_needed

    @wraps(run)
    def run_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        clock.note_queued(self, result)
        return result

    @wraps(sample)
    def launch_batch_sample_if_needed(self: Any, batch_result: Any, cur_batch: Any) -> None:
        is_delayed = batch_result is not None and batch_result.delay_sample_func is not None
        sample(self, batch_result, cur_batch)
        if is_delayed:
            clock.note_queued(self, batch_result)

    Scheduler.run_batch, Scheduler.launch_batch_sample_if_needed = run_batch, launch_batch_sample_if_needed


def _record_results(recorder: Recorder, clock: _Clock) -> None:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import get_parallel

    stock = Scheduler.process_batch_result

    @wraps(stock)
    def process_batch_result(self: Any, batch: Any, result: Any) -> None:
        reqs = list(batch.reqs)
        before = [len(req.output_ids) for req in reqs]
        stock(self, batch, result)
        if get_parallel().tp_rank:
            return
        counts: dict[str, list[int]] = {}
        for req, length in zip(reqs, before, strict=True):
            count = counts.setdefault(str(req.rid).partition("-")[0], [0, 0])
            count[0] += 1
            count[1] += len(req.output_ids) - length
        width = getattr(result, "speculative_num_draft_tokens", None) or 1
        steps = getattr(result, "num_non_draft_tokens_per_req", 1)
        recorder.write(clock.seconds(result), int(batch.forward_mode.is_decode()), len(reqs), width, steps, counts)

    Scheduler.process_batch_result = process_batch_result


def _fix_widths(recorder: Recorder) -> None:
    from sglang_orthrus.round.policy import Policy

    def steered(stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            own = self.__dict__.setdefault("_own_controller", self._controller)
            # Other ranks have no controller: they take over what the first one chooses.
            self._controller = own if recorder.width is None or own is None else FixedWidth(recorder.width)
            return stock(self, *args, **kwargs)

        return method

    for name in ("plan", "observe", "forget"):
        setattr(Policy, name, steered(getattr(Policy, name)))
