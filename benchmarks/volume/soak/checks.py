"""What every answer of the soak has to keep to. Pure: no server."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema

from benchmarks.common.equality import NEAR_TIE, Divergence, find_divergence
from benchmarks.volume.soak.client import Answer, Reply
from benchmarks.volume.soak.prompts import TOOLS
from benchmarks.volume.soak.requests import Request

GapAfter = Callable[[int, Sequence[int], Sequence[int]], Divergence | None]
"""(number of the answer, plain SGLang's ids, ours) -> where they first differ, by plain SGLang's own ranking."""
_OK = 200
_LOGPROB_SLACK = 2e-3


@dataclass
class Verdict:
    """What is wrong with one reply, and which differences rounding explains."""

    problems: list[str] = field(default_factory=list)
    near_ties: list[Divergence] = field(default_factory=list)


def check(request: Request, reply: Reply) -> list[str]:
    """What is wrong with a reply by itself."""
    if reply.status != _OK:
        return [f"status {reply.status}: {reply.error}"]
    if reply.error:
        return [f"error: {reply.error}"]
    if request.act == "control":
        return []
    problems = []
    if len(reply.answers) != request.answers:
        problems.append(f"{len(reply.answers)} answers instead of {request.answers}")
    for number, answer in enumerate(reply.answers):
        problems += [f"answer {number}: {problem}" for problem in _check_answer(request, answer)]
    return problems + _check_usage(reply)


def compare(
    request: Request,
    ours: Reply,
    theirs: Reply,
    divergence_of: GapAfter,
    alone: Callable[[int], Answer],
    tie_below: float = NEAR_TIE,
) -> Verdict:
    """A greedy reply against plain SGLang's to the same request.

    alone: plain SGLang's answer of that number to the request sent once more, alone.
    """
    verdict = Verdict()
    if len(ours.answers) != len(theirs.answers):
        verdict.problems.append(f"{len(ours.answers)} answers, plain SGLang gives {len(theirs.answers)}")
        return verdict
    is_cut = request.act in ("cut", "abort") or ours.aborted or theirs.aborted
    equal = True
    for number, (our, their) in enumerate(zip(ours.answers, theirs.answers, strict=True)):
        our_ids, their_ids = our.ids, their.ids
        if our_ids is not None and their_ids is not None:
            length = min(len(our_ids), len(their_ids)) if is_cut else max(len(our_ids), len(their_ids))
            if our_ids[:length] != their_ids[:length]:
                equal = False
                _judge(verdict, number, divergence_of(number, their_ids[:length], our_ids[:length]), our, their)
                if request.act == "session":
                    break  # what follows has another context
                continue
        if not is_cut:
            problems = _differences(our, their)
            # In a batch plain SGLang forgets penalties of a request that it retracts, so it is asked again.
            if _logprob_differences(our, their, tie_below):
                problems += _logprob_differences(our, alone(number), tie_below)
            verdict.problems += [f"answer {number}: {what}" for what in problems]
    if equal and not is_cut and not verdict.problems and ours.usage != theirs.usage:
        verdict.problems.append(f"usage {ours.usage}, plain SGLang's {theirs.usage}")
    return verdict


def _judge(verdict: Verdict, number: int, divergence: Divergence | None, our: Answer, their: Answer) -> None:
    if divergence is None:
        return  # plain SGLang's own answer depends on its batch here, and alone it gives ours
    if divergence.near_tie:
        verdict.near_ties.append(divergence)
        return
    verdict.problems.append(
        f"answer {number}: differs from plain SGLang's at token {divergence.index}: {divergence.actual} instead of "
        f"{divergence.expected}, gap {divergence.gap:.3g}; {our.text!r} ({our.finish}), not {their.text!r} "
        f"({their.finish})"
    )


def _differences(our: Answer, their: Answer) -> list[str]:
    """Of two answers with the same ids."""
    problems = []
    for name in ("text", "reasoning", "calls", "finish", "matched", "tokens"):
        mine, other = getattr(our, name), getattr(their, name)
        if mine != other:
            problems.append(f"{name} {mine!r}, plain SGLang's {other!r}")
    return problems


def _logprob_differences(our: Answer, their: Answer, tie_below: float) -> list[str]:
    """The first log probability that differs, of two answers with the same ids."""
    slack = max(_LOGPROB_SLACK, tie_below)
    for index, (mine, other) in enumerate(zip(our.logprobs or (), their.logprobs or (), strict=False)):
        if mine is not None and other is not None and abs(mine - other) > slack * max(1.0, abs(other)):
            return [f"log probability {index} is {mine}, plain SGLang's {other}"]
    return []


# -- one answer


def _check_answer(request: Request, answer: Answer) -> list[str]:
    problems: list[str] = []
    ids = answer.ids
    if request.act == "cut":
        problems += [] if ids else ["a stream without tokens"]
    elif request.act == "abort" and answer.finish != "abort" and not _may_end(request):
        problems.append(f"finish reason {answer.finish!r} after an abort")
    elif answer.finish is None:
        problems.append("no finish reason")
    completion, reasoning = answer.tokens[1], answer.tokens[2]
    if ids is not None:
        if completion is not None and completion != len(ids):
            problems.append(f"{completion} completion tokens are counted, {len(ids)} came")
        problems += _check_length(request, answer, ids)
        if set(ids) & set(request.banned):
            problems.append(f"forbidden ids {sorted(set(ids) & set(request.banned))}")
        problems += [f"id {token} is none" for token in ids if token < 0]
    if reasoning is not None and completion is not None and reasoning > completion:
        problems.append(f"{reasoning} reasoning tokens of {completion} completion tokens")
    text = answer.text if not request.body.get("echo") else ""
    problems += [f"stop string {stop!r} is in the text" for stop in request.stops if stop in text]
    if answer.finish in ("stop", "tool_calls") and request.valid:
        problems += _check_valid(request.valid, answer)
    return problems + _check_logprobs(request, answer)


def _may_end(request: Request) -> bool:
    """Whether a text may have ended before the abort came."""
    options = {**request.body, **request.body.get("sampling_params", {})}
    return bool(request.valid or request.stops or options.get("stop_regex") or options.get("stop_token_ids"))


def _check_length(request: Request, answer: Answer, ids: Sequence[int]) -> list[str]:
    problems = []
    limit = request.limit
    # SGLang gives one token for a limit of none.
    if limit is not None and len(ids) > max(limit, 1):
        problems.append(f"{len(ids)} tokens with a limit of {limit}")
    if answer.finish == "length" and limit is not None and len(ids) < limit:
        problems.append(f"finish reason length after {len(ids)} of {limit} tokens")
    if answer.finish == "stop" and isinstance(answer.matched, int) and ids and ids[-1] != answer.matched:
        problems.append(f"stopped by id {answer.matched}, the last one is {ids[-1]}")
    if answer.finish == "stop" and isinstance(answer.matched, int) and len(ids) <= request.min_tokens:
        problems.append(f"ended by id after {len(ids)} tokens, at least {request.min_tokens} were asked for")
    return problems


def _check_valid(valid: dict[str, Any], answer: Answer) -> list[str]:
    """A text that its grammar ended."""
    text = answer.text
    if "schema" in valid:
        return _check_json(text, valid["schema"])
    if "regex" in valid and not re.fullmatch(valid["regex"], text):
        return [f"{text!r} does not match {valid['regex']!r}"]
    if "nested" in valid and not re.fullmatch(r"(\(+)x(\)+)", text):
        return [f"{text!r} is not nested"]
    if "nested" in valid and text.count("(") != text.count(")"):
        return [f"{text!r} is not balanced"]
    if "tags" in valid and text.count("<tool_call>") != text.count("</tool_call>"):
        return [f"an open tag in {text!r}"]
    if "call" in valid:
        return _check_calls(answer, is_strict=valid["strict"])
    return []


def _check_calls(answer: Answer, *, is_strict: bool) -> list[str]:
    """Of any of the tools: SGLang does not hold a model to the one that a request names. Only strict ones bind."""
    if not answer.calls:
        return [f"no tool call in {answer.text!r}"]
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    problems = []
    for called, arguments in answer.calls:
        if called not in parameters:
            problems.append(f"a call of {called!r}, not of {sorted(parameters)}")
        else:
            problems += _check_json(arguments, parameters[called] if is_strict else {})
    return problems


def _check_json(text: str, schema: dict[str, Any]) -> list[str]:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return [f"{text!r} does not follow its schema: {str(error).splitlines()[0]}"]
    return []


def _check_logprobs(request: Request, answer: Answer) -> list[str]:
    wanted = request.logprobs
    if wanted is None:
        return []
    if answer.logprobs is None:
        return ["no log probabilities"]
    # With echo the prompt's come first.
    listed = answer.logprobs if not request.body.get("echo") else answer.logprobs[1:]
    generated = [value for value in listed if value is not None and math.isfinite(value) and value <= 1e-4]
    problems = []
    if len(generated) != len(listed):
        problems.append(f"a log probability that is none: {listed}")
    if problems or request.act == "cut" or request.body.get("echo") or answer.ids is None:
        return problems
    # Chats list no log probability for an id that ended the text, or for what a stop string cut.
    # With a limit of none the token that SGLang samples all the same is listed, as in a mixed batch of plain SGLang's.
    is_listed = len(generated) == len(answer.ids) or (request.limit == 0 and len(generated) == 1)
    if request.path == "/generate" and not is_listed:
        problems.append(f"{len(generated)} log probabilities of {len(answer.ids)} tokens")
    if request.path == "/generate" and wanted["top"]:
        if [len(row) for row in answer.top] != [wanted["top"]] * len(generated):
            problems.append(f"{[len(row) for row in answer.top]} alternatives instead of {wanted['top']} each")
        elif any(
            row[0][0] is None or row[0][0] < value - 1e-4 for row, value in zip(answer.top, generated, strict=True)
        ):
            problems.append("an alternative listed first is less probable than the token")
    if request.path == "/generate" and wanted["ids"] and {len(row) for row in answer.at_ids} - {wanted["ids"]}:
        problems.append(f"{[len(row) for row in answer.at_ids]} log probabilities of {wanted['ids']} ids")
    return problems


def _check_usage(reply: Reply) -> list[str]:
    if reply.usage is None:
        return []
    _, completion, reasoning = reply.usage
    problems = []
    counted = [len(answer.ids) for answer in reply.answers if answer.ids is not None]
    if len(counted) == len(reply.answers) and completion != sum(counted):
        problems.append(f"usage counts {completion} completion tokens, {sum(counted)} came")
    if reasoning is not None and completion is not None and reasoning > completion:
        problems.append(f"usage counts {reasoning} reasoning tokens of {completion} completion tokens")
    return problems


def ranked_divergence(
    ranked: Answer, expected: Sequence[int], actual: Sequence[int], tie_below: float
) -> Divergence | None:
    """Where ours differs from plain SGLang's answer alone, whose alternatives are listed.

    Args:
        ranked: plain SGLang's answer to the same request, sent alone, two alternatives listed per token.
        expected: its answer in the run, cut to the length that is compared.
    """
    alone = list(ranked.ids or expected)[: max(len(expected), len(actual))]

    def gap_after(common: Sequence[int]) -> float:
        if len(common) >= len(ranked.top) or len(ranked.top[len(common)]) < 2:
            return math.inf
        best, second = (value for value, _ in ranked.top[len(common)][:2])
        return math.inf if best is None or second is None else float(best) - float(second)

    return find_divergence(alone, actual, gap_after, tie_below)
