"""Held-out prompts, and a server's greedy answers to them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from benchmarks.common.equality import Answer, Ranking
from examples.train_nano.chat_format import sample_prompt
from examples.train_nano.corpus import FAMILIES, held_out
from sglang_orthrus.cli.server import Server

NUM_RANKED = 5
MAX_NEW_TOKENS = 448


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt; `name` is its family and index."""

    name: str
    family: str
    ids: tuple[int, ...]


def load_prompts(model: Path, count: int) -> list[Prompt]:
    """`count` prompts or a few more, spread evenly over all families."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = []
    for family in FAMILIES:
        for index, sample in enumerate(held_out(family, math.ceil(count / len(FAMILIES)))):
            ids = tokenizer.encode(sample_prompt(sample), add_special_tokens=False).ids
            prompts.append(Prompt(f"{family}/{index}", family, tuple(ids)))
    return prompts


def stop_ids(model: Path) -> set[int]:
    """Ids that end a text, from the configuration and the generation configuration."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            value = json.loads((model / name).read_text())["eos_token_id"]
            found |= set(value if isinstance(value, list) else [value])
    return found


def collect(server: Server, prompts: Sequence[Prompt], batch_size: int) -> list[Answer]:
    """Greedy answers, with `batch_size` requests in flight: they join and leave as they please."""
    server.get("/flush_cache?timeout=30")
    with ThreadPoolExecutor(batch_size) as pool:
        return list(progress(pool.map(partial(ask, server), prompts), len(prompts), f"batch {batch_size}"))


def ask(server: Server, prompt: Prompt) -> Answer:
    """A greedy answer; with the ranking of every token, unless the server speculates."""
    is_plain = "--speculative-algorithm" not in server.command
    reply = server.post(
        "/generate",
        {
            "input_ids": list(prompt.ids),
            "sampling_params": {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS},
            **({"return_logprob": True, "top_logprobs_num": NUM_RANKED} if is_plain else {}),
        },
    )
    meta = reply["meta_info"]
    ranked = tuple(map(ranking_of, meta.get("output_top_logprobs") or ()))
    return Answer(tuple(reply["output_ids"]), meta.get("spec_verify_ct", 0), ranked)


def ranking_of(listed: Sequence[Any]) -> Ranking:
    """SGLang's list of (log probability, token, text), without the texts."""
    return tuple((logprob, token) for logprob, token, _ in listed)


def progress(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    return tqdm(items, total=total, desc=label, disable=None)
