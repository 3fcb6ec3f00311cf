"""Tokens per cycle that others measured for the released checkpoints, for speed-ups computed from a measured round.

Their claims under their conditions (Hugging Face transformers or their own ports, batch size 1, greedy); none was
measured by this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.common.widen import SHAPES

_CHARTS = "charts in the README of chiennv2000/orthrus; read by eye, accepted drafts plus the bonus token"
_NEUKIRU = "Neukiru/orthrus_vllm, RTX 5090, 200 questions, weighted by tokens"
_LATENT = "latent-data/orthrus-serve, DGX Spark"


@dataclass(frozen=True)
class Published:
    """Mean tokens per cycle of a released size on a task, the bonus token included."""

    shape: str
    task: str
    tokens_per_cycle: float
    source: str


PUBLISHED = (
    Published("1.7B", "GSM8K", 7.75, _NEUKIRU),
    Published("4B", "GSM8K", 9.95, _NEUKIRU),
    Published("8B", "MATH-500", 12.7, _CHARTS),
    Published("8B", "GSM8K", 10.6, _CHARTS),
    Published("8B", "AIME25", 10.5, _CHARTS),
    Published("8B", "MBPP", 7.9, _CHARTS),
    Published("8B", "long code", 8.73, _LATENT),
    Published("8B", "JSON", 6.56, _LATENT),
    Published("8B", "explanation", 4.12, _LATENT),
    Published("8B", "creative writing", 2.79, _LATENT),
)


def released_shape(config: Mapping[str, Any]) -> str | None:
    """Which released size has this configuration's shape; None for others, such as nano."""
    for name, width in SHAPES.items():
        if (config["hidden_size"], config["num_hidden_layers"]) == (width.hidden, width.layers):
            return name
    return None


def published_for(shape: str | None) -> list[Published]:
    """The figures of one released size."""
    return [figure for figure in PUBLISHED if figure.shape == shape]
