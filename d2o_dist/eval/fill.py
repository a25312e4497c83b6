"""As much text as fits: the largest number of pieces whose prompt stays within a number of tokens."""

from __future__ import annotations

from collections.abc import Callable

# A prompt this near to its limit is long enough; so long texts are not tokenised once more for a few tokens.
SLACK = 16


def largest_fit(tokens: Callable[[int], int], limit: int, *, most: int, what: str) -> int:
    """The largest (or, within `SLACK` tokens, nearly largest) `n` in `[0, most]` with `tokens(n) <= limit`.

    Args:
        tokens: pieces -> tokens of the prompt; it grows with the pieces.
        most: pieces there are; what: names the row in errors.

    Raises:
        ValueError: not even the prompt without pieces fits, or all pieces together leave it short of `limit`.
    """
    base = tokens(0)
    if base > limit:
        raise ValueError(f"{what}: the prompt without text has {base} tokens, above its length ({limit})")
    low, at_low, high = 0, base, most + 1
    guess, halve = min(most, 8), False
    while high - low > 1 and limit - at_low > SLACK:
        count = tokens(guess)
        per_piece = max((count - base) / guess, 1e-3)
        if count <= limit:
            low, at_low = guess, count
        else:
            high = guess
        # Where the limit lies if pieces go on as they did, and every other time the middle of what is left.
        guess = (low + high) // 2 if halve and high <= most else low + int((limit - at_low) / per_piece)
        guess, halve = min(max(guess, low + 1), high - 1), not halve
    if low == most and limit - at_low > SLACK:
        raise ValueError(f"{what}: all {most} pieces of text give {at_low} tokens, short of its length ({limit})")
    return low
