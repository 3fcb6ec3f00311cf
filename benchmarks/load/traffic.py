"""What clients ask for under load: requests by kind, and mixes of kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.common.greedy import MAX_NEW_TOKENS, load_prompts
from benchmarks.speed.prompts import LONGEST
from benchmarks.structured.cases import Case, foreign_cases, own_cases
from examples.train_nano.corpus import FAMILIES

FOREIGN, SCHEMA, ONCE = "foreign", "schema", "once"
KINDS = (*FAMILIES, SCHEMA, FOREIGN)
MIXED, MIXED_WITH_FOREIGN = "mixed", "mixed_with_foreign"
# Of the requests in the mix with foreign schemas, one in so many has one.
_ONE_IN = 10
_ONCE_TOKENS = 900
_FOREIGN_TOKENS = 160


@dataclass(frozen=True)
class Request:
    """A greedy request.

    Attributes:
        kind: a family of nano's prompts; `schema`, such a prompt for JSON with its schema as a grammar; `foreign`, a
            schema of a kind that nano was not trained on; `once`, a text that nano drafts badly.
    """

    kind: str
    ids: tuple[int, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def body(self, name: str) -> dict[str, Any]:
        """For `/generate`."""
        sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS} | dict(self.sampling)
        return {"rid": name, "input_ids": list(self.ids), "sampling_params": sampling}


class Traffic:
    """Requests of every kind and mix, on the tokenizer of a checkpoint.

    Args:
        model: checkpoint directory.
        per_kind: different prompts of a family.
    """

    def __init__(self, model: Path, per_kind: int = 200) -> None:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

        def constrained(kind: str, cases: Sequence[Case]) -> list[Request]:
            sampling = {"max_new_tokens": _FOREIGN_TOKENS}
            encoded = [tokenizer.encode(case.prompt, add_special_tokens=False).ids for case in cases]
            pairs = zip(cases, encoded, strict=True)
            return [Request(kind, tuple(ids), sampling | case.grammar) for case, ids in pairs]

        self._requests: dict[str, list[Request]] = {family: [] for family in FAMILIES}
        for prompt in load_prompts(model, per_kind * len(FAMILIES)):
            if len(prompt.ids) <= LONGEST:
                self._requests[prompt.family].append(Request(prompt.family, prompt.ids))
        self._requests[FOREIGN] = constrained(FOREIGN, foreign_cases())
        self._requests[SCHEMA] = constrained(SCHEMA, own_cases(per_kind))
        once = tokenizer.encode("Once", add_special_tokens=False).ids
        self._requests[ONCE] = [Request(ONCE, tuple(once), {"max_new_tokens": _ONCE_TOKENS, "ignore_eos": True})]

    def take(self, name: str, count: int) -> list[Request]:
        """`count` requests of a kind or mix; the same again after the last."""
        return list(islice(self._endless(name), count))

    def _endless(self, name: str) -> Iterator[Request]:
        if name not in (MIXED, MIXED_WITH_FOREIGN):
            return cycle(self._requests[name])
        families = chain.from_iterable(zip(*(cycle(self._requests[family]) for family in FAMILIES), strict=True))
        if name == MIXED:
            return families
        foreign = cycle(self._requests[FOREIGN])
        nine = zip(*([families] * (_ONE_IN - 1)), strict=True)
        return chain.from_iterable((*group, next(foreign)) for group in nine)
