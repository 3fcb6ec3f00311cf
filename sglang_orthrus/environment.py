"""What is set by environment variables; docs/structured.md documents them. Light: every SGLang process reads it."""

from __future__ import annotations

import os
from enum import Enum

GRAMMAR_DRAFT = "ORTHRUS_GRAMMAR_DRAFT"
SLOW_MASK_MS = "ORTHRUS_SLOW_MASK_MS"


class DraftMode(Enum):
    """What a grammar does to drafts; verification is masked in any case.

    REPAIR: a draft that the grammar does not allow is replaced by the string that the grammar forces there, or else by
    the best candidate that it allows. FULL: the same at every position, allowed or not. OFF: drafts stay as they are.
    """

    REPAIR = "repair"
    FULL = "full"
    OFF = "off"

    @classmethod
    def from_env(cls) -> DraftMode:
        """The mode that `ORTHRUS_GRAMMAR_DRAFT` names, `repair` if it is unset.

        Raises:
            ValueError: naming the value and the fix.
        """
        value = os.environ.get(GRAMMAR_DRAFT, cls.REPAIR.value)
        try:
            return cls(value)
        except ValueError:
            choices = ", ".join(mode.value for mode in cls)
            raise ValueError(f"{GRAMMAR_DRAFT}={value}: use one of {choices}, or unset it for repair.") from None


def slow_mask_seconds(is_cpu: bool = False) -> float:
    """How long the masks of a round may take, by `ORTHRUS_SLOW_MASK_MS`: 10 ms if it is unset, on a CPU 100.

    What is saved by leaving masks out costs more on a CPU, a second run of the head.

    Raises:
        ValueError: naming the value and the fix.
    """
    value = os.environ.get(SLOW_MASK_MS, "100" if is_cpu else "10")
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = -1.0
    if not milliseconds >= 0:
        raise ValueError(f"{SLOW_MASK_MS}={value}: use milliseconds, 0 or more, or unset it.")
    return milliseconds / 1e3
