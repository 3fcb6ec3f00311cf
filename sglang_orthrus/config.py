"""What an Orthrus checkpoint says about its diffusion view, read once from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ARCHITECTURES = ("OrthrusLM", "OrthrusForCausalLM")


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
