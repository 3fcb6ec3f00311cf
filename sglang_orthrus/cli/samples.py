"""ORTHRUS's own counters and gauges in the text of `/metrics`. Pure, and without SGLang."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_SAMPLE = re.compile(r"^(sglang_orthrus:\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Sample(NamedTuple):
    """A line of `/metrics`."""

    name: str
    labels: Mapping[str, str]
    value: float


def parse(metrics: str) -> Iterator[Sample]:
    """The samples in Prometheus's text."""
    for name, labels, value in _SAMPLE.findall(metrics):
        yield Sample(name, dict(_LABEL.findall(labels)), float(value))
