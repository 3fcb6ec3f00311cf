"""What the checkpoint says of its diffusion view, and what environment variables set (docs/serving.md)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from typing import Any

ARCHITECTURES = ("OrthrusLM", "OrthrusForCausalLM")
# Of quantised checkpoints, as their configuration names them.
QUANT_METHODS = ("awq", "compressed-tensors", "fp8", "gptq")
GRAMMAR_DRAFT = "ORTHRUS_GRAMMAR_DRAFT"
SLOW_MASK_MS = "ORTHRUS_SLOW_MASK_MS"
SPEED_FLOOR = "ORTHRUS_SPEED_FLOOR"
DEFAULT_SPEED_FLOOR = 0.88
WIDTHS = "ORTHRUS_WIDTHS"
# Its value for one width alone.
LARGEST = "largest"
# The widths below the largest that rounds may have if the variable is unset.
_NARROWER = (1, 8, 16, 32)


def is_orthrus(hf_config: Any) -> bool:
    """Whether a checkpoint declares a dual-view architecture (its `model_type` is plain `qwen3`)."""
    return any(name in ARCHITECTURES for name in getattr(hf_config, "architectures", None) or ())


@dataclass(frozen=True, slots=True)
class DualViewConfig:
    """The trained shape of the diffusion view (paper, section 3).

    Attributes:
        block_size: draft block width F in tokens: the anchor and F-1 masked positions.
        mask_token_id: vocabulary row that stands for a position to be drafted.
    """

    block_size: int
    mask_token_id: int

    @classmethod
    def from_hf(cls, hf_config: Any) -> DualViewConfig:
        """Read `block_size` and `mask_token_id` from a Hugging Face configuration.

        Raises:
            ValueError: naming the keys that are absent or out of range.
        """
        missing = [key for key in ("block_size", "mask_token_id") if getattr(hf_config, key, None) is None]
        if missing:
            raise ValueError(
                f"config.json has no {' and no '.join(missing)}: this is not a complete Orthrus checkpoint. "
                "The released ones carry block_size 32 and mask_token_id 151669."
            )
        block_size, mask_token_id = int(hf_config.block_size), int(hf_config.mask_token_id)
        if block_size < 2:
            raise ValueError(f"config.json: block_size is {block_size}; a draft block needs at least 2 tokens.")
        if not 0 <= mask_token_id < hf_config.vocab_size:
            raise ValueError(
                f"config.json: mask_token_id {mask_token_id} is outside the vocabulary of {hf_config.vocab_size}."
            )
        return cls(block_size, mask_token_id)


class DraftMode(Enum):
    """What a grammar does to drafts; verification is masked in any case.

    REPAIR: a draft that the grammar does not allow is replaced by the string that the grammar forces there, or else by
    the best candidate that it allows. OFF: drafts stay as they are.
    """

    REPAIR = "repair"
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


def widths_from_env(largest: int) -> tuple[int, ...]:
    """The widths that rounds may have, ascending, by `ORTHRUS_WIDTHS`: numbers with commas between them, or `largest`.

    If it is unset, they are 1, 8, 16 and 32, as far as they are smaller than the largest, and the largest.

    Args:
        largest: `--speculative-num-draft-tokens`.

    Raises:
        ValueError: naming the value and the fix.
    """
    value = os.environ.get(WIDTHS)
    if value is None:
        return (*(width for width in _NARROWER if width < largest), largest)
    if value == LARGEST:
        return (largest,)
    try:
        widths = sorted({int(part) for part in value.split(",")})
    except ValueError:
        widths = []
    if not widths or widths[0] < 1:
        raise ValueError(
            f"{WIDTHS}={value}: use numbers of tokens with commas between them, as in 1,8,16,{largest}, or {LARGEST} "
            "for that width alone, or unset it."
        )
    if widths[-1] != largest:
        raise ValueError(
            f"{WIDTHS}={value}: the largest width is {largest}, as --speculative-num-draft-tokens says; set that flag "
            f"to {widths[-1]}, or add {largest}."
        )
    return tuple(widths)


def slow_mask_seconds(is_cpu: bool = False) -> float:
    """How long the masks of a round may take, by `ORTHRUS_SLOW_MASK_MS`: 10 ms if it is unset, on a CPU 100.

    What is saved by leaving masks out costs more on a CPU, a second run of the head.

    Raises:
        ValueError: naming the value and the fix.
    """
    return _number(SLOW_MASK_MS, 100.0 if is_cpu else 10.0, "milliseconds, 0 or more", at_most=float("inf")) / 1e3


def speed_floor() -> float:
    """The share of plain decoding's speed that requests are kept at, by `ORTHRUS_SPEED_FLOOR`: 0.88 if it is unset.

    Requests end a little behind it. It is meant to keep every kind of request at 0.8 or more in the long run.

    Raises:
        ValueError: naming the value and the fix.
    """
    return _number(SPEED_FLOOR, DEFAULT_SPEED_FLOOR, "a share from 0, for none, to 1", at_most=1.0)


def _number(name: str, default: float, meaning: str, at_most: float) -> float:
    """An environment variable's number from 0 on."""
    value = os.environ.get(name, str(default))
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= at_most:
        raise ValueError(f"{name}={value}: use {meaning}, or unset it.")
    return number
