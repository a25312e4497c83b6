"""Batches: within the limits, little padding, the same every time."""

from __future__ import annotations

import random

import pytest

from d2o_dist.engine.batching import SLACK_TOKENS, make_batches


def test_limits_and_padding():
    lengths = [random.Random(0).choice([5, 30, 90, 400, 1000]) + i for i in range(60)]
    batches = make_batches(lengths, 8, 4000, None)
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    assert batches == make_batches(lengths, 8, 4000, None)
    for batch in batches:
        inside = [lengths[i] for i in batch]
        assert len(batch) <= 8 and max(inside) * len(batch) <= 4000
        assert min(inside) >= max(inside) / 2 or max(inside) - min(inside) <= SLACK_TOKENS


@pytest.mark.parametrize(
    ("lengths", "size", "tokens", "expected"),
    [
        ([], 4, 100, []),
        ([10, 10, 10], 2, 100, [[0, 1], [2]]),
        ([10, 12, 11], 8, 24, [[1, 2], [0]]),
        ([500, 10, 490], 8, 64, [[0], [2], [1]]),  # longer than a batch may be: alone
        ([1000, 10, 600], 8, 10_000, [[0, 2], [1]]),  # ten tokens are not padded to a thousand
        ([60, 1], 8, 10_000, [[0, 1]]),  # but to sixty they are
    ],
)
def test_examples(lengths, size, tokens, expected):
    assert make_batches(lengths, size, tokens, None) == expected
