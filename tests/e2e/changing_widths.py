"""An SGLang plugin for tests: what a policy chooses is drawn from a seed for each round.

That is its width, several steps or one, and whether it leaves out requests that have ended.
"""

from __future__ import annotations

from random import Random
from typing import Any

from sglang_orthrus.round.policy import PLAIN_STEPS, Policy, RoundPlan, has_logit_options, has_options

SEED = 7


def register() -> None:
    """Have every policy of this process choose by lot."""
    random = Random(SEED)
    stock = Policy.plan

    def plan(self: Policy, batch: Any, can_defer: bool) -> RoundPlan:
        found = stock(self, batch, can_defer)
        width = random.choice(self._widths)
        may_have_more = width == 1 and not has_options(batch)
        num_steps = random.randint(1, PLAIN_STEPS) if may_have_more else 1
        if self._controller is not None:
            self._planned[-1].num_steps = num_steps
        may_wait = can_defer and num_steps == 1 and not has_logit_options(batch)
        leaves_out_ended = may_wait and random.random() < 0.5
        return found._replace(width=width, num_steps=num_steps, leaves_out_ended=leaves_out_ended)

    Policy.plan = plan  # type: ignore[method-assign]
