"""Options of the soak's requests, mixed at random; and what they ask of the answers. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from benchmarks.volume.soak.prompts import TOOLS, grammar, history, order, question, render

_PREFIXES = 4


@dataclass
class Draft:
    """A request in the making.

    Attributes:
        sampling: options under the names of `/generate`.
        rules: fields of the request that say what its answers keep to.
        words: what it has, for its kind.
        hint: what its grammar adds to the prompt.
    """

    sampling: dict[str, Any]
    rules: dict[str, Any]
    words: list[str] = field(default_factory=list)
    body: dict[str, Any] = field(default_factory=dict)
    hint: str = ""

    def openai(self, copies: int) -> None:
        """Move the options into the body under the names of the OpenAI interfaces."""
        options = dict(self.sampling)
        limit = options.pop("max_new_tokens")
        options["max_tokens"] = limit = max(1, limit or 24)
        options["min_tokens"] = least = min(options.pop("min_new_tokens", 0), limit)
        if "sampling_seed" in options:
            options["seed"] = options.pop("sampling_seed")
        self.body |= {"model": "default", "n": copies} | options
        self.rules |= {"limit": limit, "min_tokens": least}


# Plain SGLang's scheduler dies where two requests of a batch forbid unlike tokens by the same processor.
BANNED = tuple(Random(0).sample(range(200, 1200), 20))


def options(random: Random, processor: str | None, free: bool | None = None) -> Draft:
    """Limits, sampling, and either a grammar or what only free text takes; `free` decides, else chance does."""
    greedy = random.random() < 0.7
    # The median is some 15 tokens: a CPU computes 32 rows per request and round.
    limits = (
        *(random.randrange(8, 25), random.randrange(2, 9), 1, 0),
        *(random.randrange(25, 65), random.randrange(97, 300)),
    )
    limit = random.choices(limits, (60, 22, 5, 2, 10, 1))[0]
    rules: dict[str, Any] = {"greedy": greedy, "valid": {}, "stops": (), "min_tokens": 0}
    draft = Draft({"temperature": 0, "max_new_tokens": limit}, rules)
    if not greedy:
        _distribution(random, draft)
    constrained = random.random() < 0.3 if free is None else not free
    if constrained:
        # Mostly long enough for the grammar to end the text.
        draft.sampling["max_new_tokens"] = random.choices((64, limit), (80, 20))[0]
    if constrained and free is None:
        wanted = grammar(random)
        draft.sampling |= wanted.sampling
        rules["valid"] = wanted.valid
        draft.hint = wanted.hint
        draft.words.append(next(iter(wanted.sampling)))
    if not constrained:
        _free_text(random, draft)
    _adjustments(random, processor, draft)
    rules["limit"] = draft.sampling["max_new_tokens"]
    return draft


def _distribution(random: Random, draft: Draft) -> None:
    sampling = draft.sampling
    sampling["temperature"] = round(random.uniform(0.2, 1.6), 2)
    for name, share, value in (
        ("top_p", 0.4, round(random.uniform(0.3, 1.0), 2)),
        ("top_k", 0.4, random.choice((1, 2, 8, 50, 4000))),
        ("min_p", 0.2, round(random.uniform(0.0, 0.4), 2)),
        ("sampling_seed", 0.3, random.randrange(2**31)),
    ):
        if random.random() < share:
            sampling[name] = value
    draft.words.append("seeded" if "sampling_seed" in sampling else "sampled")


def _free_text(random: Random, draft: Draft) -> None:
    """Stops, the end ignored, a least length: what a grammar decides for itself."""
    sampling, rules = draft.sampling, draft.rules
    limit = sampling["max_new_tokens"]
    if random.random() < 0.08:
        sampling["ignore_eos"] = True
        draft.words.append("ignore_eos")
    if random.random() < 0.08:
        sampling["min_new_tokens"] = rules["min_tokens"] = random.randrange(limit + 1)
        draft.words.append("min_new_tokens")
    if random.random() < 0.2:
        kind = random.choice(("stop", "stop", "stop_token_ids", "stop_regex"))
        if kind == "stop":
            sampling[kind] = random.sample((" the", "a", " is", "1", "\n", "Answer", ", "), random.randrange(1, 4))
            rules["stops"] = tuple(sampling[kind])
        elif kind == "stop_token_ids":
            sampling[kind] = random.sample(range(200, 1200), random.randrange(1, 60))
        else:
            sampling[kind] = random.choice((r"[0-9]{2}", r" (is|was|has)", r"\."))
        draft.words.append(kind)


def _adjustments(random: Random, processor: str | None, draft: Draft) -> None:
    sampling = draft.sampling
    if random.random() < 0.15:
        # Not all three: in which order plain SGLang applies both kinds depends on its process (`patches/0018`).
        additive = (("frequency_penalty", -0.5, 1.2), ("presence_penalty", -0.5, 1.2))
        for name, low, high in random.choice((additive, (("repetition_penalty", 0.9, 1.5),))):
            if random.random() < 0.6:
                sampling[name] = round(random.uniform(low, high), 2)
        draft.words.append("penalties")
    if random.random() < 0.08:
        ids = random.sample(range(100, 1500), random.randrange(1, 12))
        sampling["logit_bias"] = {str(token): round(random.uniform(-6, 6), 1) for token in ids}
        draft.words.append("logit_bias")
    if processor is not None and random.random() < 0.05 and not draft.rules["valid"]:
        sampling["custom_params"] = {"token_ids": list(BANNED)}
        draft.body["custom_logit_processor"] = processor
        draft.rules["banned"] = BANNED
        draft.words.append("processor")


def logprobs(random: Random, draft: Draft) -> None:
    """The forms of `/generate`."""
    top = random.choice((0, 0, 1, 2, 5, 20))
    ids = random.sample(range(4000), random.choice((0, 0, 1, 3)))
    draft.body |= {"return_logprob": True, "top_logprobs_num": top}
    if ids:
        draft.body["token_ids_logprob"] = ids
    if random.random() < 0.2:
        draft.body["logprob_start_len"] = random.choice((0, 3))
    if random.random() < 0.2:
        draft.body["return_text_in_logprobs"] = True
    draft.rules["logprobs"] = {"top": top, "ids": len(ids)}
    draft.words.append("logprobs")


def prompt(random: Random, seed: int, draft: Draft) -> str:
    """A task, now and then behind one of a few long texts."""
    task = order(random) + draft.hint if "schema" in draft.rules["valid"] else question(random) + draft.hint
    if random.random() < 0.12:
        shared = Random(f"{seed}/{random.randrange(_PREFIXES)}")
        task = f"{history(shared, 250)}\n\n{task}"
        draft.words += ["prefix"] * ("prefix" not in draft.words)
    return render(task, thinking=random.random() < 0.1)


def tools(random: Random, draft: Draft) -> None:
    choice = random.choice(("auto", "auto", "required", "named"))
    name = random.choice(TOOLS)["function"]["name"]
    strict = random.random() < 0.7
    draft.body["tools"] = [{**tool, "function": {**tool["function"], "strict": strict}} for tool in TOOLS]
    draft.body["tool_choice"] = {"type": "function", "function": {"name": name}} if choice == "named" else choice
    if choice != "auto":
        draft.rules["valid"] = {"call": True, "strict": strict}
    draft.words.append(f"tool {choice}")
