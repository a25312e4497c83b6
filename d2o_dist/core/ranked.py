"""How many of a model's highest ranked tokens each KV head has, wherever its tokens lie (the budget rule `ranked`).

Tokens are neither gathered nor sorted. The rank that the last one of them has is found digit by digit, from the
numbers of tokens that have each digit: those of several ranks add up, and do not grow with the context.

Shape legend: B rows, L layers, h KV heads at hand, H KV heads of a layer, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_DIGIT_BITS = 8
_DIGITS = 1 << _DIGIT_BITS


def count_highest(
    rankings: Sequence[Tensor], live: Sequence[Tensor], num_highest: Tensor, over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Of the tokens at hand, how many rank above the last of the `num_highest` of all ranks' tokens, and level with it.

    Args:
        rankings: L tensors [B, h, S] float32 or float64, no NaN; live: L tensors [B, h, S] bool, the slots that count.
        num_highest: [B] int64 on the device of the rankings, at least 1 and at most the row's tokens on all ranks; what
            it is for a row without tokens does not matter.
        over_ranks: [B, 256] int64 of the tokens at hand -> the sum over all ranks. Called 4 times for float32, 8 for
            float64.

    Returns:
        Two tensors [B, h, L] int64.
    """
    bits = 8 * rankings[0].dtype.itemsize
    left, prefix = num_highest.clone(), torch.zeros_like(num_highest)
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        first = shift == bits - _DIGIT_BITS
        counts = torch.zeros(len(left), _DIGITS, dtype=torch.int64, device=left.device)
        for ranking, valid in zip(rankings, live, strict=True):
            bits_of = ordered(ranking)
            digit = (bits_of >> shift) & (_DIGITS - 1)
            if first:
                digit = digit ^ (_DIGITS >> 1)  # the sign: negative ones are below the others
            else:
                valid = valid & (bits_of >> (shift + _DIGIT_BITS) == prefix[:, None, None])
            counts.scatter_add_(1, digit.flatten(1), valid.flatten(1).long())
        # Of all that begin like the one that is looked for: how many have this digit or a higher one.
        at_least = over_ranks(counts).flip(-1).cumsum(-1).flip(-1)
        found = (at_least >= left[:, None]).sum(-1, keepdim=True) - 1
        above = torch.nn.functional.pad(at_least, (0, 1)).gather(-1, found + 1)
        left -= above[:, 0]
        digit = found[:, 0]
        prefix = digit - (_DIGITS >> 1) if first else (prefix << _DIGIT_BITS) + digit
    cut = prefix[:, None, None]
    above = [((ordered(one) > cut) & valid).sum(-1) for one, valid in zip(rankings, live, strict=True)]
    level = [((ordered(one) == cut) & valid).sum(-1) for one, valid in zip(rankings, live, strict=True)]
    return torch.stack(above, -1), torch.stack(level, -1)


def deal_level(above: Tensor, level: Tensor, num_highest: Tensor) -> Tensor:
    """[B, L, H]: how many of the `num_highest` tokens each KV head has. Of those that rank alike the lower layer's
    count first, then the lower head's.

    Args:
        above, level: [B, H, L] of all KV heads, from `count_highest`.
    """
    above, level = above.transpose(1, 2), level.transpose(1, 2)
    left = (num_highest - above.sum((1, 2)))[:, None]
    flat = level.flatten(1)
    taken = torch.minimum((left - (flat.cumsum(-1) - flat)).clamp_min(0), flat)
    return above + taken.unflatten(1, level.shape[1:])


def ordered(ranking: Tensor) -> Tensor:
    """int64 that order as the floats do; 0 and -0 are one number."""
    kind = torch.int32 if ranking.dtype == torch.float32 else torch.int64
    bits = (ranking + 0.0).view(kind)
    return torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits).long()
