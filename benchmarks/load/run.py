"""Plain SGLang, every fixed width and widths that follow traffic, under the same load.

    python -m benchmarks.load cpu
    python -m benchmarks.load gpu --model /tmp/wide-8b --server-arg="--attention-backend fa3" \\
        --out benchmarks/results/h200/load-fa3.json [--resume]

Greedy requests, with the prompts and grammars of `benchmarks.load.traffic`. Two servers run, on a GPU a third one with
SGLang's own NGRAM speculation, and one of them is loaded. All write down their results (`benchmarks.load.recorder`).
Fixed widths run on the server that adapts, which is told the width: all have the same graphs and memory.

- `decode`: so many requests; when a quarter of them are answered, as many new ones are sent at once. Rounds that follow
  a round are timed. So decoding is timed alone, under a steady load: answers are short, 80 tokens in the mean, and
  prefills take a large share of the time. A kind alone is timed behind a batch of its like, so that widths have
  followed. On a CPU, and where texts are short, servers take three turns each at a setting.
- `serve`: a closed loop of the mixes, where a request that ends is replaced at once: output tokens per second, prefills
  and all else included. Fixed widths do not run it.
- `ngram` runs the mix of nano's families only.
- `steps`: concurrency that rises and falls: plain SGLang, the largest width, and widths that follow.
- `open`: an open loop (`benchmarks.load.open_loop`) of these three, from light load to more than plain SGLang serves.

`summary` holds the ratios, `servers` what SGLang made of the servers' arguments. Every finished run is written at once;
`--resume` continues a file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.common.plugins import with_plugins
from benchmarks.common.provenance import RESULTS, provenance
from benchmarks.load import open_loop
from benchmarks.load.client import Side, closed_loop, in_steps, refilled
from benchmarks.load.figures import ADAPTIVE, PLAIN, Result, decode_figures, summary, timeline
from benchmarks.load.open_loop import SHARES
from benchmarks.load.recorder import RECORDS_ENV
from benchmarks.load.traffic import FOREIGN, KINDS, MIXED, MIXED_WITH_FOREIGN, ONCE, SCHEMA, Traffic
from benchmarks.speed.measures import digest
from benchmarks.volume.soak.report import write
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.config import WIDTHS
from sglang_orthrus.models.checkpoint import export_ar

_RECORDER = {"recorder": "benchmarks.load.recorder"}
# Requests of a run: at least, per request in flight, and at most.
_LEAST, _PER_SLOT, _MOST = 18, (8, 4), 512
# At 128 in flight so many of these kinds, whose texts are short, are decoded within a second.
_SHORT, _SHORT_TURNS = ("chat", "code", "qa", "tools"), 3


@dataclass(frozen=True)
class Setting:
    """Traffic at a concurrency, whether fixed widths get it, too, and how often servers get it in turn."""

    traffic: str
    concurrency: int
    with_fixed: bool
    turns: int = 1


@dataclass(frozen=True)
class Mode:
    """What is measured.

    Attributes:
        args: of both servers.
        widths: that rounds may have, ascending.
        settings: in order.
        steps: (seconds, requests in flight), one after another.
        shares: of the requests per second that plain SGLang serves in a closed loop: arrivals in an open one.
        rivals: further flags of plain SGLang by name: servers that get the traffic of fixed widths, too.
    """

    args: tuple[str, ...]
    widths: tuple[int, ...]
    settings: tuple[Setting, ...]
    steps: tuple[tuple[float, int], ...]
    shares: tuple[float, ...] = SHARES
    rivals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def limited(self, traffic: Sequence[str] | None, concurrency: Sequence[int] | None) -> Mode:
        """A part of it; None for all."""
        settings = [
            setting
            for setting in self.settings
            if (traffic is None or setting.traffic in traffic)
            and (concurrency is None or setting.concurrency in concurrency)
        ]
        if traffic is None:
            return replace(self, settings=tuple(settings))
        return replace(self, settings=tuple(settings), steps=(), shares=())


MODES = {
    "cpu": Mode(
        ("--dtype", "float32", "--context-length", "2048", "--max-total-tokens", "16384"),
        (1, 8, 16, 32),
        (
            # A CPU's speed drifts by some percent within minutes.
            *(Setting(MIXED, concurrency, True, turns=3) for concurrency in (1, 4)),
            *(Setting(kind, concurrency, False, turns=3) for concurrency, kind in product((1, 4), (*KINDS, ONCE))),
        ),
        ((4.0, 1), (4.0, 8), (4.0, 1)),
    ),
    # SGLang's defaults, but for memory, since several servers run, and the number of requests.
    "gpu": Mode(
        ("--max-running-requests", "128", "--max-total-tokens", "120000", "--enable-metrics"),
        (1, 8, 16, 32),
        (
            # What tells most comes first: a machine may be lent for minutes.
            *(Setting(MIXED, concurrency, True) for concurrency in (32, 128, 64, 8, 1, 4)),
            *(Setting(FOREIGN, concurrency, False) for concurrency in (128, 32, 8, 1)),
            *(Setting(MIXED_WITH_FOREIGN, concurrency, False) for concurrency in (128, 32, 64, 8)),
            Setting(ONCE, 1, False),
            *(
                Setting(kind, concurrency, False, _SHORT_TURNS if concurrency == 128 and kind in _SHORT else 1)
                for concurrency, kind in product((128, 32, 8, 1), KINDS)
                if kind != FOREIGN
            ),
            *(Setting(FOREIGN, concurrency, False) for concurrency in (64, 4)),
            Setting(MIXED, 16, True),
        ),
        ((3.0, 2), (3.0, 64), (3.0, 2), (3.0, 16), (3.0, 128), (3.0, 4)),
        rivals={"ngram": ("--speculative-algorithm", "NGRAM")},
    ),
}


def num_requests(setting: Setting) -> int:
    """Of a run; kinds differ in length and acceptance, so a mix needs more for the same accuracy."""
    if setting.traffic == ONCE:
        return 1
    is_kind = setting.traffic in KINDS
    return max(_LEAST, min(_PER_SLOT[is_kind] * setting.concurrency, _MOST))


class _Turn(NamedTuple):
    """A server's turn at a setting.

    Attributes:
        answers: digests in the order of the requests.
        tokens: of all answers.
        seconds: that they took.
        results: that the server wrote down.
        served: tokens per second of the closed loop, if there was one.
    """

    answers: list[str]
    tokens: int
    seconds: float
    results: list[Result]
    served: float | None


def _key(server: str, setting: Setting) -> dict[str, Any]:
    """What tells a run from others."""
    return {"server": server, "traffic": setting.traffic, "concurrency": setting.concurrency}


class Runs:
    """Runs settings and collects their figures.

    Args:
        mode: what is measured.
        model: the dual-view checkpoint.
        sides: servers by name.
        result: the JSON so far.
    """

    def __init__(self, mode: Mode, model: Path, sides: dict[str, Side], result: dict[str, Any], out: Path) -> None:
        self._mode = mode
        self._model = model
        self._traffic = Traffic(model)
        self._sides = sides
        self._result = result
        self._out = out
        self._fixed = [str(width) for width in reversed(mode.widths)]

    def warm_up(self) -> None:
        """Every grammar is compiled once, and graphs have run."""
        for side in self._sides.values():
            side.set_width(None)
            for traffic, count in ((FOREIGN, 66), (SCHEMA, 40), (MIXED, 36)):
                asyncio.run(closed_loop(side, self._traffic.take(traffic, count), 8))

    def all(self) -> None:
        """What the result lacks."""
        for setting in self._mode.settings:
            others = (*self._mode.rivals, *self._fixed) if setting.with_fixed else ()
            servers = [server for server in (PLAIN, *others, ADAPTIVE) if self._find(_key(server, setting)) is None]
            turns = [[self._turn(server, setting) for server in servers] for _ in range(setting.turns)]
            for server, own in zip(servers, zip(*turns, strict=True), strict=True):
                self._add(server, setting, own)
        for server in (PLAIN, self._fixed[0], ADAPTIVE):
            if self._mode.steps and server not in self._result["steps"]:
                side = self._side(server)
                results = asyncio.run(in_steps(side, self._traffic.take(MIXED, 9 * 400), self._mode.steps))
                self._result["steps"][server] = timeline(results)
                self._write()
        for share, server in product(self._mode.shares, (PLAIN, self._fixed[0], ADAPTIVE)):
            self._run_open(server, share)

    def _run_open(self, server: str, share: float) -> None:
        key = {"server": server, "share": share}
        if any(key.items() <= run.items() for run in self._result["open"]):
            return
        rate = share * self._served_by_plain()
        requests = self._traffic.take(MIXED, open_loop.num_requests(rate))
        figures = open_loop.measure(self._side(server).url, self._model, requests, rate)
        self._result["open"].append(key | {"rate": round(rate, 2)} | figures)
        self._write()
        print(f"{server} {share}: {figures}", file=sys.stderr, flush=True)

    def _served_by_plain(self) -> float:
        """Requests per second, in a closed loop of the mix, at the most requests in flight."""
        runs = [run for run in self._result["runs"] if run["server"] == PLAIN and run["traffic"] == MIXED]
        if not runs:
            sys.exit(f"An open loop needs a run of {MIXED} traffic before it; --traffic {MIXED} makes one.")
        most = max(runs, key=lambda run: run["concurrency"])
        return float(most["requests"] * most["serve_tokens_per_second"] / most["tokens"])

    def _turn(self, server: str, setting: Setting) -> _Turn:
        """server: `plain`, `adaptive`, a rival or a width."""
        count, concurrency = num_requests(setting), setting.concurrency
        requests = self._traffic.take(setting.traffic, count + concurrency)
        requests, others = requests[:count], requests[count:]
        side = self._side(server)
        if setting.traffic in KINDS:
            asyncio.run(refilled(side, others, concurrency))
        answers, seconds, results = asyncio.run(refilled(side, requests, concurrency))
        served = None
        if setting.traffic in (MIXED, MIXED_WITH_FOREIGN) and server in self._sides:
            replies, serving, _ = asyncio.run(closed_loop(side, requests, concurrency))
            served = sum(map(len, replies)) / serving
        return _Turn([digest(str(answer)) for answer in answers], sum(map(len, answers)), seconds, results, served)

    def _add(self, server: str, setting: Setting, turns: Sequence[_Turn]) -> None:
        results = [result for turn in turns for result in turn.results]
        figures = decode_figures(results, min(setting.concurrency, num_requests(setting)))
        digests = [answer for turn in turns for answer in turn.answers]
        served = [turn.served for turn in turns if turn.served is not None]
        plain = self._find(_key(PLAIN, setting))
        expected = digests if plain is None else plain["answers"].split()
        self._result["runs"].append(
            _key(server, setting)
            | {
                "requests": len(digests),
                "tokens": sum(turn.tokens for turn in turns),
                "seconds": round(sum(turn.seconds for turn in turns), 3),
                "decode": figures,
                "serve_tokens_per_second": round(fmean(served), 1) if served else None,
                "identical_to_plain": sum(a == b for a, b in zip(digests, expected, strict=True)),
                "answers": " ".join(digests),
            }
        )
        self._write()
        print(f"{server} {setting}: {figures}"[:500], file=sys.stderr, flush=True)

    def _side(self, server: str) -> Side:
        side = self._sides.get(server, self._sides[ADAPTIVE])
        side.set_width(int(server) if server.isdecimal() else None)
        return side

    def _find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return next((run for run in self._result["runs"] if key.items() <= run.items()), None)

    def _write(self) -> None:
        self._result["summary"] = summary(self._result["runs"], self._fixed, tuple(self._mode.rivals))
        write(self._result, self._out)


@contextmanager
def servers(mode: Mode, model: Path, args: list[str]) -> Iterator[dict[str, Side]]:
    """All servers, each with the recorder."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        exported = export_ar(model, folder / "ar")
        plugins = with_plugins(folder / "site", _RECORDER)
        own = {WIDTHS: ",".join(map(str, mode.widths))}
        theirs = plain_env() | {"SGLANG_PLUGINS": next(iter(_RECORDER))}

        def side(name: str, model: Path, *flags: str, env: Mapping[str, str]) -> Side:
            records = folder / f"{name}.jsonl"
            env = plugins | dict(env) | {RECORDS_ENV: str(records)}
            server = Server(model, *flags, *mode.args, *args, env=env, timeout=900)
            began = time.perf_counter()
            url = stack.enter_context(server).url
            return Side(url, records, round(time.perf_counter() - began, 1))

        yield {
            PLAIN: side(PLAIN, exported, env=theirs),
            ADAPTIVE: side(ADAPTIVE, model, *ORTHRUS_ARGS, env=own),
            **{rival: side(rival, exported, *flags, env=theirs) for rival, flags in mode.rivals.items()},
        }


@contextmanager
def running(urls: list[str]) -> Iterator[dict[str, Side]]:
    """Servers that were started elsewhere with the recorder: NAME=URL=RECORDS."""
    yield {name: Side(url, Path(records)) for name, url, records in (text.split("=", 2) for text in urls)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--model", type=Path, default=NANO, help="a dual-view checkpoint; the bundled one by default")
    parser.add_argument("--server-arg", action="append", default=[], help="for both servers; repeatable")
    parser.add_argument(
        "--running",
        nargs="+",
        metavar="NAME=URL=RECORDS",
        help="servers that were started with the recorder, and the files that they write: plain, adaptive, and rivals",
    )
    parser.add_argument("--traffic", nargs="+", help="of these kinds and mixes only, and no steps")
    parser.add_argument("--concurrency", nargs="+", type=int, help="at these only")
    parser.add_argument("--resume", action="store_true", help="go on where --out ends")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    mode = MODES[options.mode].limited(options.traffic, options.concurrency)
    args = [part for text in options.server_arg for part in shlex.split(text)]
    out = options.out or RESULTS / f"load-{options.mode}.json"
    result: dict[str, Any] = {"summary": [], "runs": [], "steps": {}, "open": []}
    if options.resume and out.exists():
        result = json.loads(out.read_text())
    result["provenance"] = provenance()
    with running(options.running) if options.running else servers(mode, options.model, args) as sides:
        result["servers"] = {name: side.describe() for name, side in sides.items()}
        mode = replace(mode, rivals={name: flags for name, flags in mode.rivals.items() if name in sides})
        runs = Runs(mode, options.model, sides, result, out)
        runs.warm_up()
        runs.all()
    print(json.dumps(result["summary"], indent=1))
