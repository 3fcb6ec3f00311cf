"""What the ends of texts take from rounds."""

from __future__ import annotations

from collections import Counter, deque
from itertools import count

import numpy as np
import pytest

from sglang_orthrus.round.costs import RoundCosts
from sglang_orthrus.round.text_ends import PRIOR_TOKENS, TextEnds, within_text
from sglang_orthrus.round.width_controller import WidthController


@pytest.mark.parametrize(("width", "end_rate"), [(1, 0.05), (8, 0.05), (16, 0.01), (32, 0.2)])
def test_the_mean_of_many_texts(width: int, end_rate: float) -> None:
    """Rounds that commit their whole width of texts that end anywhere: the means of 20,000 texts. The seed is fixed."""
    lengths = np.random.default_rng(0).geometric(end_rate, 20_000)
    rounds = np.ceil(lengths / width)
    expected = within_text(np.array([[float(width)]]), np.array([[end_rate]]))
    assert expected[0, 0] == pytest.approx(lengths.sum() / rounds.sum(), rel=0.02)


def test_texts_without_an_end_take_in_all() -> None:
    tokens = np.array([[1.0, 7.5, 20.0]])
    assert within_text(tokens, np.zeros((1, 1))) == pytest.approx(tokens, rel=1e-6)
    ends = TextEnds(2)
    ends.observe(0, 100)
    assert ends.committed(tokens, np.array([1])) == pytest.approx(tokens, rel=1e-6)


def test_the_rate_is_that_of_the_last_texts() -> None:
    """Each with its tokens: long texts run longer, so they count for more."""
    ends, tokens = TextEnds(1), np.array([[8.0]])
    for length in (20, 180) * 300:
        ends.observe(0, length)
    assert ends.committed(tokens, np.array([0])) == pytest.approx(within_text(tokens, np.array([[1 / 100]])), rel=0.01)
    for _ in range(600):
        ends.observe(0, 10)
    # The prior counts as many tokens as it did at first.
    rate = 93 / (930 + PRIOR_TOKENS)
    assert ends.committed(tokens, np.array([0])) == pytest.approx(within_text(tokens, np.array([[rate]])), rel=0.01)


@pytest.mark.parametrize(("plain_steps", "rounds_late", "best"), [(7.3, 0, 1), (6.0, 0, 8), (5.7, 1, 1), (4.8, 1, 8)])
def test_short_texts_have_the_width_that_serves_them_best(plain_steps: float, rounds_late: int, best: int) -> None:
    """Texts of 20 tokens, of which all drafts are right: width 8 takes 3 rounds of so many plain steps.

    By the 8 tokens that rounds commit before the last ones, width 8 would be better in all cases. Under overlap
    scheduling it takes 4 rounds, plain decoding 21 steps. Every request takes its share of a round's time.
    """
    costs = RoundCosts({1: {1: 1 / 64, 64: 1.0}, 8: {1: plain_steps / 64, 64: plain_steps}})
    controller = WidthController(costs, floor=0.0, rounds_late=rounds_late)
    names, running, ended = count(), dict[int, int](), dict[int, int]()
    late, widths = deque[tuple[list[int], int, list[int], dict[int, int]]](), Counter[int]()
    for step in range(1200):
        while len(running) + len(ended) < 64:
            running[next(names)] = 20
        keys = [*running, *ended]
        for key in running:
            controller.start(key, "texts")
        width = controller.plan(keys).width
        widths[width] += step >= 400
        lens = [min(width, left) for left in running.values()] + [0] * len(ended)
        running = {key: left - width for key, left in running.items()}
        ended = {key: left for key, left in running.items() if left <= 0}
        running = {key: left for key, left in running.items() if left > 0}
        late.append((keys, width, lens, ended))
        if len(late) > 1:
            before, before_width, before_lens, over = late.popleft()
            controller.observe(before, before_width, before_lens, cut=[key for key, left in over.items() if left < 0])
            for key in over:
                controller.forget(key, 20)
    assert widths[best] >= 0.9 * widths.total()
