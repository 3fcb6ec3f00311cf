"""An SGLang plugin for tests: rounds take another width each time, at random from a seed."""

from __future__ import annotations

from random import Random
from typing import Any

from sglang_orthrus.round.policy import Policy, RoundPlan

SEED = 7


def register() -> None:
    """Have every policy of this process choose by lot."""
    random = Random(SEED)
    stock = Policy.plan

    def plan(self: Policy, *args: Any, **kwargs: Any) -> RoundPlan:
        return stock(self, *args, **kwargs)._replace(width=random.choice(self._widths))

    Policy.plan = plan  # type: ignore[method-assign]
