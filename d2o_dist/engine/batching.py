"""Batches of rows of similar length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

# A row joins a batch when it is at least half as long as the longest one, or shorter by no more than this: padding
# then at most doubles the work, and short rows are not scattered over many batches.
SLACK_TOKENS = 64


def alike(length: int, longest: int, border: int | None) -> bool:
    """Whether a prompt may be read together with one that is at least as long.

    Rows of up to `border` tokens and longer ones are not put together: the model turns all rows of a batch as it does
    the longest.
    """
    same_side = border is None or (length > border) == (longest > border)
    return same_side and (2 * length >= longest or longest - length <= SLACK_TOKENS)


def make_batches(
    lengths: Sequence[int], max_batch_size: int, max_batch_tokens: int, border: int | None
) -> list[list[int]]:
    """Indices into `lengths`, grouped; the longest rows come first, so that a lack of memory shows at once.

    Every batch has at most `max_batch_size` rows and `longest * rows <= max_batch_tokens` padded tokens; a row that
    is longer than `max_batch_tokens` by itself is a batch alone, and all of them are `alike`. The same lengths always
    give the same batches.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        count = len(batches[-1]) + 1 if batches else 0
        fits = 0 < count <= max_batch_size and count * longest <= max_batch_tokens
        if fits and alike(length, longest, border):
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = length
    return batches
