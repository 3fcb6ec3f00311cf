"""What is set by environment variables; docs/structured.md documents them. Light: every SGLang process reads it."""

from __future__ import annotations

import os
from enum import Enum

GRAMMAR_DRAFT = "ORTHRUS_GRAMMAR_DRAFT"


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
