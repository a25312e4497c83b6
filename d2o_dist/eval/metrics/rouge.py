"""ROUGE over token lists: overlap of n-grams (ROUGE-1) and of the longest common subsequence (ROUGE-L)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_NOT_WORD = re.compile(r"[^a-z0-9]+")


def words(text: str) -> list[str]:
    """Lower-case runs of ASCII letters and digits: what ROUGE counts, without stemming."""
    return [word for word in _NOT_WORD.split(text.lower()) if word]


def f_measure(overlap: float, num_predicted: int, num_expected: int) -> float:
    """Harmonic mean of precision and recall; 0 where nothing overlaps."""
    return 2 * overlap / (num_predicted + num_expected) if overlap else 0.0


def rouge_1(predicted: str, expected: str) -> float:
    """F-measure of the words two texts share."""
    mine, theirs = words(predicted), words(expected)
    return f_measure(sum((Counter(mine) & Counter(theirs)).values()), len(mine), len(theirs))


def lcs_members(a: Sequence[str], b: Sequence[str]) -> set[str]:
    """The set of words on one longest common subsequence; of several, the one that drops the last word of `b` first."""
    table = [[0] * (len(b) + 1)]
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(table[-1][j] + 1 if x == y else max(table[-1][j + 1], row[j]))
        table.append(row)
    found, i, j = set(), len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.add(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
