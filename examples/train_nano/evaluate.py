"""Measures an exported checkpoint on held-out prompts: `python -m examples.train_nano.evaluate --out eval.json`.

Per family: exact answers, tokens per cycle of real draft-and-verify rounds (bonus included), what prompt-lookup
drafting would get on the same outputs, and how much of the output is copied from the prompt or fixed by the format.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from examples.train_nano.chat_format import sample_prompt
from examples.train_nano.corpus import FAMILIES, HELD_OUT_SEED, held_out
from examples.train_nano.decode import Generation, generate
from examples.train_nano.export import NANO_DIR, load_exported
from examples.train_nano.measures import COPY_TOKENS, NGRAM_DRAFTS, copied, fixed_by_format, is_exact, ngram_rounds
from examples.train_nano.model import OrthrusLM
from examples.train_nano.sample import Sample
from examples.train_nano.tokenizer import END_OF_TEXT, END_OF_TURN

MAX_NEW = 400


class Result(NamedTuple):
    """One scored answer."""

    sample: Sample
    prompt: list[int]
    generation: Generation
    text: str
    exact: bool | None


def _stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    ids = (tokenizer.token_to_id(token) for token in (END_OF_TURN, END_OF_TEXT))
    return frozenset(id_ for id_ in ids if id_ is not None)


def run_family(
    model: OrthrusLM, tokenizer: Tokenizer, samples: list[Sample], batch: int, max_new: int, speculate: bool
) -> list[Result]:
    """Answers and scores samples, `batch` at a time, short prompts together."""
    stop_ids = _stop_ids(tokenizer)
    prompts = [tokenizer.encode(sample_prompt(sample), add_special_tokens=False).ids for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: len(prompts[i]))
    results: dict[int, Result] = {}
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        generations = generate(model, [prompts[i] for i in chosen], max_new, stop_ids, speculate)
        for i, generation in zip(chosen, generations, strict=True):
            ids = generation.ids
            text = tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids, skip_special_tokens=False)
            results[i] = Result(samples[i], prompts[i], generation, text, is_exact(samples[i], text))
    return [results[i] for i in range(len(samples))]


def _shares(results: list[Result], tokenizer: Tokenizer) -> dict[str, float]:
    """Shares of reference-answer tokens that are copied, fixed by the format, either."""
    counts = {"copied": 0, "fixed": 0, "copied_or_fixed": 0}
    total = 0
    for result in results:
        encoding = tokenizer.encode(result.sample.answer + END_OF_TURN, add_special_tokens=False)
        flags = copied(result.prompt, encoding.ids)
        fixed = fixed_by_format(result.sample, encoding.offsets)
        counts["copied"] += sum(flags)
        counts["fixed"] += sum(fixed)
        counts["copied_or_fixed"] += sum(a or b for a, b in zip(flags, fixed, strict=True))
        total += len(flags)
    return {name: count / total for name, count in counts.items()}


def summarise(results: list[Result], tokenizer: Tokenizer) -> dict[str, Any]:
    """The figures of one family. Tokens per cycle: tokens after the first, divided by rounds, over all prompts."""
    stop_ids = _stop_ids(tokenizer)
    scored = [result.exact for result in results if result.exact is not None]
    drafted = sum(len(result.generation.ids) - 1 for result in results)
    rounds = sum(len(result.generation.rounds) for result in results)
    lookups = sum(ngram_rounds(result.prompt, result.generation.ids) for result in results)
    per_prompt = [
        (len(r.generation.ids) - 1) / len(r.generation.rounds) for r in results if len(r.generation.rounds) > 0
    ]
    return {
        "prompts": len(results),
        "exact": sum(scored) / len(scored) if scored else None,
        "same_as_reference": sum(r.text == r.sample.answer for r in results) / len(results),
        "unfinished": sum(r.generation.ids[-1] not in stop_ids for r in results),
        "output_tokens": drafted + len(results),
        "rounds": rounds,
        "tokens_per_cycle": drafted / max(rounds, 1),
        "tokens_per_cycle_prompt_mean": sum(per_prompt) / max(len(per_prompt), 1),
        "ngram_tokens_per_cycle": drafted / max(lookups, 1),
        **_shares(results, tokenizer),
    }


def evaluate(
    model: OrthrusLM, folder: Path, num: int, batch: int, speculate: bool = True, show: int = 0, max_new: int = MAX_NEW
) -> dict[str, Any]:
    """All families; the report with its provenance."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    families = {}
    for family in FAMILIES:
        begin = time.monotonic()
        results = run_family(model, tokenizer, held_out(family, num), batch, max_new, speculate)
        families[family] = summarise(results, tokenizer)
        line = families[family]
        exact = "    -" if line["exact"] is None else f"{line['exact']:.3f}"
        print(
            f"{family:8} exact {exact}  tokens/cycle {line['tokens_per_cycle']:.2f}  "
            f"ngram {line['ngram_tokens_per_cycle']:.2f}  copied {line['copied']:.2f}  fixed {line['fixed']:.2f}  "
            f"either {line['copied_or_fixed']:.2f}  unfinished {line['unfinished']}  {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        wrong = [r for r in results if r.exact is False]
        for r in wrong[:show]:
            print(f"   wanted {r.sample.answer!r}\n   got    {r.text!r}", flush=True)
    mean = sum(line["tokens_per_cycle"] for line in families.values()) / len(families)
    print(f"mean over families: {mean:.2f} tokens/cycle")
    weight = model.model.embed_tokens.weight
    return {
        "families": families,
        "mean_tokens_per_cycle": mean,
        "settings": {
            "held_out_seed": HELD_OUT_SEED,
            "max_new_tokens": max_new,
            "speculate": speculate,
            "block_size": model.config.block_size,
            "copy_tokens": COPY_TOKENS,
            "ngram_drafts": NGRAM_DRAFTS,
            "compute_dtype": str(weight.dtype).removeprefix("torch."),
        },
        "provenance": {
            "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            "device": torch.cuda.get_device_name() if weight.is_cuda else "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=NANO_DIR, help="an exported checkpoint")
    parser.add_argument("--num", type=int, default=100, help="held-out prompts per family")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ar-only", action="store_true", help="decode without drafts")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers per family")
    parser.add_argument("--out", type=Path, help="where to write the report as JSON")
    args = parser.parse_args()
    model = load_exported(args.folder).to(args.device, getattr(torch, args.dtype))
    report = evaluate(model, args.folder, args.num, args.batch, not args.ar_only, args.show)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
