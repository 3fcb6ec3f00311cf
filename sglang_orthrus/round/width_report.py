"""What rounds of every width came to, for the log and for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class WidthReport(NamedTuple):
    """What rounds were, since the start. Seconds are what the cost model says.

    Attributes:
        width: of the rounds now, probes apart.
        rounds: by width, as planned.
        requests: requests in observed rounds, by width.
        tokens: tokens that these committed, by width.
        num_probes: rounds that were probes.
        probe_seconds: that they cost, compared with rounds of the other width.
        seconds: of all observed rounds.
        plain_seconds: that plain decoding would have taken for the same tokens in the same batches; 0 if width 1 was
            not measured.
        num_limited: rounds whose width the floor chose.
        num_waits: rounds that waited for the former result, to leave out requests that had ended.
        wait_seconds: that they lost by that.
    """

    width: int | None
    rounds: Mapping[int, int]
    requests: Mapping[int, int]
    tokens: Mapping[int, int]
    num_probes: int
    probe_seconds: float
    seconds: float
    plain_seconds: float
    num_limited: int
    num_waits: int
    wait_seconds: float

    def __str__(self) -> str:
        """One line for the log."""
        widths = ", ".join(
            f"{width}: {self.tokens.get(width, 0) / max(1, self.requests.get(width, 0)):.1f} in {rounds} rounds"
            for width, rounds in sorted(self.rounds.items())
        )
        seconds = max(self.seconds, 1e-9)
        return (
            f"width {self.width}; tokens per cycle by width: {widths}; {self.plain_seconds / seconds:.2f} times plain "
            f"decoding's speed; {self.num_probes} probes, {100 * self.probe_seconds / seconds:.1f} % of the time; "
            f"{self.num_limited} rounds limited by the floor; {self.num_waits} waited for the former result, "
            f"{100 * self.wait_seconds / seconds:.1f} % of the time"
        )
