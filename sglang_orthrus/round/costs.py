"""What a round costs: seconds by width and batch size, from measurements of this server."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class CostRow(NamedTuple):
    """Costs of one batch size, for a table.

    Attributes:
        batch_size: requests.
        seconds: of a round at every width, the narrowest first.
    """

    batch_size: int
    seconds: tuple[float, ...]


class RoundCosts:
    """Seconds of a round, by width and batch size.

    A measurement is noisy, but a round of more requests or of more tokens never takes less time: measurements that say
    so are averaged over batch sizes, and a width costs at least what a narrower one costs.

    Args:
        seconds: width -> batch size -> measured seconds of a round.
        graph_sizes: width -> batch sizes that have a CUDA graph; a batch without a graph of its own size is padded to
            the next one, and costs as much. A batch larger than all of them, or of a width that is not named here,
            runs as it is.
        context: tokens of every request's context behind which these rounds ran.
        context_seconds: width -> seconds that a round takes more for one more token of context of any request.

    Raises:
        ValueError: a width has no measurement, or one that is not positive.
    """

    def __init__(
        self,
        seconds: Mapping[int, Mapping[int, float]],
        graph_sizes: Mapping[int, Sequence[int]] | None = None,
        context: int = 0,
        context_seconds: Mapping[int, float] | None = None,
    ) -> None:
        if not seconds or not all(seconds.values()):
            raise ValueError("every width needs a measurement")
        if any(value <= 0 for by_size in seconds.values() for value in by_size.values()):
            raise ValueError("seconds must be positive")
        self.widths = tuple(sorted(seconds))
        self._sizes = {width: sorted(by_size) for width, by_size in seconds.items()}
        self._seconds = {
            width: not_decreasing([by_size[size] for size in self._sizes[width]]) for width, by_size in seconds.items()
        }
        self._graph_sizes = {width: sorted(sizes) for width, sizes in (graph_sizes or {}).items()}
        self._rows: dict[int, FloatArray] = {}
        self._context = context
        by_width = context_seconds or {}
        # A wider round attends at least as long.
        self._context_seconds = np.maximum.accumulate([max(0.0, by_width.get(width, 0.0)) for width in self.widths])

    def seconds(self, width: int, batch_size: int) -> float:
        """Of a round of this width, behind the context of the measurements.

        Raises:
            KeyError: the width was not measured.
        """
        if width not in self._sizes:
            raise KeyError(width)
        return max(self._interpolated(other, batch_size) for other in self.widths if other <= width)

    def row(self, batch_size: int, context: int | None = None) -> FloatArray:
        """Seconds of a round at every width: [widths], not to be written to.

        context: tokens of all requests' contexts; those of the measurements if it is not given.
        """
        row = self._rows.get(batch_size)
        if row is None:
            row = np.array([self.seconds(width, batch_size) for width in self.widths])
            self._rows[batch_size] = row
        if context is None:
            return row
        # Less context saves no more than half, so that an error of the slope cannot make a round free.
        return np.asarray(np.maximum(row + self._context_seconds * (context - batch_size * self._context), row / 2))

    def saved(self, batch_size: int, fewer: Sequence[Sequence[int]], columns: Sequence[int]) -> FloatArray:
        """Share of its time that a round saves with so many fewer requests: 0 where it is padded to the same graph.

        Args:
            batch_size: with all requests.
            fewer: [N, K] less than `batch_size`, for each of these widths.
            columns: [K] of the widths.

        Returns [N, K].
        """
        seconds = [
            [self.row(batch_size - number)[column] for number, column in zip(numbers, columns, strict=True)]
            for numbers in fewer
        ]
        return np.asarray(1.0 - np.array(seconds) / self.row(batch_size)[list(columns)])

    def worthwhile(self, batch_size: int) -> BoolArray:
        """Of every width, whether a batch has a CUDA graph for it, or has none for any: [widths].

        Without a graph a round may take no longer on a GPU, but a host is busy for all of it, and queues and answers
        nothing else meanwhile.
        """
        sizes = (self._graph_sizes.get(width) for width in self.widths)
        covered = np.array([not own or batch_size <= own[-1] for own in sizes])
        return covered if covered.any() else ~covered

    def as_rows(self) -> list[CostRow]:
        """The costs at every batch size that was measured at any width."""
        sizes = sorted({size for by_width in self._sizes.values() for size in by_width})
        return [CostRow(size, tuple(map(float, self.row(size)))) for size in sizes]

    def _interpolated(self, width: int, batch_size: int) -> float:
        sizes, seconds = self._sizes[width], self._seconds[width]
        size = _padded(batch_size, self._graph_sizes.get(width, ()))
        if size <= sizes[-1]:
            return float(np.interp(size, sizes, seconds))
        # One measurement says nothing of the slope: a batch twice as large may take twice as long.
        first_size, first = (sizes[-2], seconds[-2]) if len(sizes) > 1 else (0, 0.0)
        slope = (seconds[-1] - first) / (sizes[-1] - first_size)
        return seconds[-1] + slope * (size - sizes[-1])


def _padded(batch_size: int, graph_sizes: Sequence[int]) -> int:
    index = bisect_left(graph_sizes, batch_size)
    return graph_sizes[index] if index < len(graph_sizes) else batch_size


def not_decreasing(values: Sequence[float]) -> list[float]:
    """The sequence that never decreases and has the least squared distance: neighbours in the wrong order averaged."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
