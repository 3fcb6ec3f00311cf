"""One run of SGLang's own load generator, `sglang.benchmark.serving`, on prompts of ours.

Its command line runs in this process. Two entries of its tables are ours meanwhile: a data set that holds the prompts
as token ids, and its client for `/generate`, wrapped so that what it returns is kept: the result file has neither
start times nor numbers of rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import uuid
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sglang.benchmark import serving
from sglang.benchmark.datasets import DATASET_MAPPING
from sglang.benchmark.datasets.common import BaseDataset, DatasetRow

from benchmarks.common.greedy import Prompt
from benchmarks.speed.measures import Request, chunks_of

# Its command line knows the names of its own data sets only.
_DATASET, _BACKEND = "custom", "sglang"


class LoadError(RuntimeError):
    """A request failed."""


@dataclass(frozen=True)
class Load:
    """A closed loop: `concurrency` requests in flight until all prompts are answered.

    Attributes:
        concurrency: also the number of warm-up requests.
        new_tokens: the most tokens of an answer.
        to_the_end: whether the end of text ends an answer; otherwise all have `new_tokens` tokens.
        pause: seconds between an answer and the next request.
        rate: requests per second, at random times (a Poisson process): an open loop, any number in flight.
    """

    prompts: Sequence[Prompt]
    concurrency: int
    new_tokens: int
    to_the_end: bool
    pause: float = 0.0
    rate: float | None = None


def run_load(url: str, model: Path, load: Load) -> tuple[dict[str, Any], list[Request]]:
    """SGLang's metrics, and the requests in the order of the prompts.

    As many warm-up requests as run at once come first, then the prefix cache is emptied.

    Raises:
        LoadError: if a request failed.
    """
    outputs: dict[str, Any] = {}
    client = serving.ASYNC_REQUEST_FUNCS[_BACKEND]

    async def kept(request_func_input: Any, pbar: Any = None) -> Any:
        await asyncio.sleep(load.pause)
        output = await client(request_func_input, pbar)
        name = request_func_input.extra_request_body.get("rid")
        if name is not None:  # warm-up requests have none
            outputs[name] = output
        return output

    # NOTE: never twice the same. SGLang aborts a streamed request's id once more two seconds after its end.
    names = [f"{uuid.uuid4().hex}-{number}" for number in range(len(load.prompts))]
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.jsonl", Path(folder) / "log"
        with (
            mock.patch.dict(DATASET_MAPPING, {_DATASET: _dataset(load, names)}),
            mock.patch.dict(serving.ASYNC_REQUEST_FUNCS, {_BACKEND: kept}),
            mock.patch.object(sys, "argv", ["serving", *flags(url, model, load, result)]),
            log.open("w") as stream,
            contextlib.redirect_stdout(stream),
        ):
            serving.cli_main()
        metrics = json.loads(result.read_text())
    failed = [name for name in names if name not in outputs or not is_complete(outputs[name], load)]
    if failed:
        raise LoadError(f"{len(failed)} of {len(names)} requests failed, e.g. {outputs.get(failed[0])}")
    return metrics, [request_of(prompt, outputs[name]) for name, prompt in zip(names, load.prompts, strict=True)]


def is_complete(output: Any, load: Load) -> bool:
    """Whether a request succeeded, with all its tokens if the number is fixed."""
    return output.success and (load.to_the_end or output.output_len == load.new_tokens)


def flags(url: str, model: Path, load: Load, result: Path) -> list[str]:
    """The load generator's command line."""
    pace = ("--max-concurrency", load.concurrency) if load.rate is None else ("--request-rate", load.rate)
    return [
        *("--backend", _BACKEND, "--base-url", url, "--model", str(model), "--tokenizer", str(model)),
        *("--dataset-name", _DATASET, "--num-prompts", str(len(load.prompts)), "--temperature", "0"),
        *("--warmup-requests", str(load.concurrency), "--flush-cache"),
        *map(str, pace),
        *("--ready-check-timeout-sec", "0", "--disable-tqdm", "--output-file", str(result)),
        *(("--disable-ignore-eos",) if load.to_the_end else ()),
    ]


def request_of(prompt: Prompt, output: Any) -> Request:
    """From the load generator's `RequestFuncOutput`."""
    speculated = output.spec_accept_length > 0
    return Request(
        family=prompt.family,
        first=output.start_time + output.ttft,
        ttft=output.ttft,
        latency=output.latency,
        chunks=chunks_of(output.itl),
        tokens=output.output_len,
        # SGLang's accept length is the answer's tokens over its verify passes.
        passes=round(output.output_len / output.spec_accept_length) if speculated else output.output_len - 1,
        text=output.generated_text,
    )


def _dataset(load: Load, names: Sequence[str]) -> type[BaseDataset]:
    sampling = {
        **{"temperature": 0, "max_new_tokens": load.new_tokens, "ignore_eos": not load.to_the_end},
        # A chunk without text is none to the load generator, and the first special tokens of an answer would have none.
        "skip_special_tokens": False,
    }

    class HeldOut(BaseDataset):
        @classmethod
        def from_args(cls, args: Namespace) -> HeldOut:
            return cls()

        def load(self, tokenizer: Any, model_id: str | None = None) -> list[DatasetRow]:
            return [
                DatasetRow(
                    prompt=list(prompt.ids),
                    prompt_len=len(prompt.ids),
                    output_len=load.new_tokens,
                    extra_request_body={"rid": name, "sampling_params": sampling},
                )
                for name, prompt in zip(names, load.prompts, strict=True)
            ]

    return HeldOut
