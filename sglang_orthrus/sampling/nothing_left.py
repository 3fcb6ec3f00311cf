"""Where a request's options leave no token that its grammar allows, they give way, and the grammar decides.

Without a grammar the model decides. The rule holds for one position alone: options act again at the next one. No option
allows what a grammar forbids.
"""

from __future__ import annotations

import torch

# As SGLang's `sanitize_nan_logits`: stays finite when it is divided by any temperature.
_MAX_LOGIT = 1e30


def within_the_grammar(adjusted: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """What is left to choose from, with no host synchronisation: rows of `allowed` where `adjusted` leaves nothing.

    Args:
        adjusted: [..., V], what all options left of the logits; -inf forbids. No NaN.
        allowed: [..., V], what the grammar left of them, as if there were no other option.
    """
    adjusted = adjusted.masked_fill(allowed == float("-inf"), float("-inf"))
    nothing = adjusted.amax(dim=-1, keepdim=True) == float("-inf")
    return torch.where(nothing, allowed, adjusted)


def leave_something_inplace(logits: torch.Tensor) -> None:
    """Where a grammar itself allows no token, or the model gives NaN or infinity, let all be alike. logits: [..., V]

    Whatever is drawn there, the grammar refuses it, and its request ends. Softmax would make NaN of such a row, which
    ends the scheduler, and with it the requests beside it.
    """
    logits.masked_fill_(~logits.amax(dim=-1, keepdim=True).isfinite(), 0.0)


def tame_inplace(logits: torch.Tensor) -> None:
    """Let what custom processors wrote be sampled from: NaN forbids a token, infinity is a large logit."""
    logits.nan_to_num_(nan=float("-inf"), posinf=_MAX_LOGIT, neginf=float("-inf")).clamp_(max=_MAX_LOGIT)
