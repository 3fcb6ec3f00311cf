"""Which numbers of a request may become an index, a size or a logit.

SGLang checks few of them: a scheduler dies of the others, there as here (patches/0009 to 0012).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

INT32_MAX = 2**31 - 1
# fp32 ends at 3.4e38. Logits stay finite when they are divided by a penalty and by a temperature, of 1e-6 at least. A
# bias below -1e30 forbids its token.
MAX_TEMPERATURE = 1e38
MIN_REPETITION_PENALTY = 1e-30
MAX_BIAS = 1e30
# Texts that one request may ask for with `n`. More prompts than that may come in one request, whose size they pay for.
MAX_SAMPLES = 4096
# Log probabilities of the prompts of all its texts, and of the texts. They become Python numbers, and while the
# scheduler makes them, it serves nobody else.
MAX_LOGPROBS = 2**22
# So many per generated token are always allowed: the OpenAI API ends at 20, and the context's length bounds the rest.
FEW_LOGPROBS = 64
# Fields of SGLang's `SamplingParams` that a request can set, although SGLang computes them.
_COMPUTED = ("is_normalized", "stop_str_max_len", "stop_regex_max_len")


class Numbers(NamedTuple):
    """What a request gives, besides its sampling parameters.

    Attributes:
        input_ids: int64, those of a session's former turns included where they are known.
        top_logprobs_num: 0 if no log probabilities are wanted.
        logprob_start_len: -1 if no log probabilities of the input are wanted.
        token_ids_logprob: ids.
        positions: indices into the input, by the field that names them.
        embed_widths: of every embedding that is given instead of a token.
        max_history: at most as many tokens come before `input_ids`, of a session's former turns.
        max_output: at most as many tokens follow; 0 if that is not known.
    """

    input_ids: Sequence[int]
    top_logprobs_num: int = 0
    logprob_start_len: int = -1
    token_ids_logprob: Sequence[int] = ()
    positions: tuple[tuple[str, Sequence[int]], ...] = ()
    embed_widths: Sequence[int] = ()
    max_history: int = 0
    max_output: int = 0


class _Check(NamedTuple):
    """Values of a field and the range that they have to be in; None leaves an end open."""

    field: str
    values: Iterable[float]
    low: float | None
    high: float | None


def value_problem(numbers: Numbers, params: Any, vocab_size: int, hidden_size: int | None = None) -> str | None:
    """The first field whose value is out of range, with the range; None if every value may be used.

    Args:
        numbers: of the request.
        params: SGLang's `SamplingParams`, verified by SGLang.
        vocab_size: of the model.
        hidden_size: of the model; None not to check embeddings.
    """
    last = vocab_size - 1
    stops = params.stop_token_ids or () if params.min_new_tokens > 0 else ()
    checks = (
        _Check("input_ids", _extremes(numbers.input_ids), 0, last),
        _Check("stop_token_ids (with min_new_tokens)", stops, 0, last),
        _Check("token_ids_logprob", numbers.token_ids_logprob, 0, last),
        _Check("number of token_ids_logprob", (len(numbers.token_ids_logprob),), None, vocab_size),
        # At most 0 is none at all, as in plain SGLang.
        _Check("top_logprobs_num", (numbers.top_logprobs_num,), None, vocab_size),
        _Check("logprob_start_len", (numbers.logprob_start_len,), -1, None),
        *(_Check(field, indices, 0, len(numbers.input_ids) - 1) for field, indices in numbers.positions),
        _Check("length of input_embeds", set(numbers.embed_widths), hidden_size, hidden_size),
        _Check("min_new_tokens", (params.min_new_tokens,), None, INT32_MAX),
        _Check("top_k", (params.top_k,), None, INT32_MAX),
        _Check("temperature", (params.temperature,), None, MAX_TEMPERATURE),
        _Check("repetition_penalty", (params.repetition_penalty,), MIN_REPETITION_PENALTY, None),
        _Check("logit_bias", (params.logit_bias or {}).values(), None, MAX_BIAS),
    )
    for field, values, low, high in checks:
        for value in values:
            if not ((low is None or value >= low) and (high is None or value <= high)):
                return f"{field}: {value} is out of range, {_range(low, high)}."
    return _logprobs_problem(numbers, max(params.n, 1))


def _logprobs_problem(numbers: Numbers, n: int) -> str | None:
    per_token = max(numbers.top_logprobs_num, 0) + len(numbers.token_ids_logprob)
    length = numbers.max_history + max(len(numbers.input_ids), len(numbers.embed_widths))
    in_prompt = max(length - numbers.logprob_start_len, 0) if numbers.logprob_start_len >= 0 else 0
    in_output = numbers.max_output if per_token > FEW_LOGPROBS else 0
    for num_tokens, of_what in (
        (in_prompt, f"prompt tokens from logprob_start_len {numbers.logprob_start_len} on"),
        (in_output, "new tokens (max_new_tokens)"),
    ):
        values = n * num_tokens * per_token
        if values > MAX_LOGPROBS:
            field = "top_logprobs_num" if numbers.top_logprobs_num > 0 else "number of token_ids_logprob"
            return (
                f"{field}: {per_token} log probabilities of each of {num_tokens} {of_what}, for n = {n}, are {values} "
                f"values, at most {MAX_LOGPROBS}."
            )
    return None


def samples_problem(num_prompts: int, n: int) -> str | None:
    """Why a request may not ask for `n` texts of each of its prompts; None if it may."""
    if n <= 1 or num_prompts * n <= MAX_SAMPLES:
        return None
    return f"n: {n} texts of {num_prompts} prompts are too many, at most {MAX_SAMPLES} texts come of one request."


def computed_fields(sampling_params: Any) -> str | None:
    """Why a request's raw `sampling_params` can't be taken: fields that SGLang computes; None if there are none."""
    given = [field for field in _COMPUTED if field in (sampling_params or ())]
    return f"sampling_params: {', '.join(given)} cannot be given, as SGLang computes them." if given else None


def without_pitfalls(params: Any, vocab_size: int) -> None:
    """Rewrite what is served, but not as it is: in `params`, which `value_problem` has no objection to.

    Stop ids outside the vocabulary, which no token matches, go: SGLang takes them for indices as soon as another
    request of the batch has min_new_tokens. A bias that forbids its token is -inf, whatever the temperature.
    """
    if params.stop_token_ids:
        params.stop_token_ids = {token for token in params.stop_token_ids if 0 <= token < vocab_size} or None
    if params.logit_bias:
        params.logit_bias = {
            token: bias if bias >= -MAX_BIAS else -math.inf for token, bias in params.logit_bias.items()
        }


def _extremes(ids: Sequence[int]) -> tuple[int, ...]:
    """The smallest and the largest, without a loop over a long prompt in Python."""
    found = np.asarray(ids, dtype=np.int64)
    return (int(found.min()), int(found.max())) if found.size else ()


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high}"
    return f"at least {low}" if high is None else f"allowed are {low} to {high}"
