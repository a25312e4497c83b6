"""What a total gives to each layer: shares within their limits, and whole slots that add up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from d2o_dist.policy.budget import BudgetRule, Size, floor_tokens


def water_fill(log_weights: Sequence[float], total: float, low: Sequence[float], high: Sequence[float]) -> list[float]:
    """Shares in proportion to the weights, within `[low, high]`, that add up to `total`.

    Layers that hit a clamp are fixed there and the rest share what is left, until no more clamp. When a round hits
    both clamps, the side that misses the total by more is fixed first; otherwise the total could not be met.

    Raises:
        ValueError: `total` is below the sum of `low`.
    """
    if total < sum(low) - 1e-9 * len(low):
        raise ValueError(f"a total of {total:.6g} layers is below the sum of the layers' minima ({sum(low):.6g})")
    if total >= sum(high):
        return list(high)
    shares: list[float] = list(low)
    free = set(range(len(log_weights)))
    left = total
    while free:
        members = sorted(free)
        peak = max(log_weights[i] for i in members)
        weights = {i: math.exp(log_weights[i] - peak) for i in members}
        norm = sum(weights.values())
        wanted = {i: left * weights[i] / norm for i in members}
        over = {i for i in members if wanted[i] > high[i]}
        under = {i for i in members if wanted[i] < low[i]}
        excess = sum(low[i] - wanted[i] for i in under) - sum(wanted[i] - high[i] for i in over)
        fixed = (under if excess > 0 else over) if over and under and excess != 0 else over | under
        if not fixed:
            for i in members:
                shares[i] = wanted[i]
            break
        for i in fixed:
            shares[i] = high[i] if i in over else low[i]
            left -= shares[i]
        free -= fixed
    return shares


def check_total(rule: BudgetRule, size: Size, num_layers: int) -> None:
    """Refuse a total that the protected layers and the minima of the others alone exceed, and shares of other layers.

    Raises:
        ValueError: names the total and what is fixed.
    """
    rule.check_layers(num_layers)
    protected = rule.protected(num_layers)
    if not rule.exact_total or size.keep_ratio is None:
        return
    total = size.keep_ratio * num_layers
    fixed = len(protected) + (num_layers - len(protected)) * rule.min_layer_ratio
    if fixed > total + 1e-9:
        raise ValueError(
            f"keep_ratio ({size.keep_ratio}) of {num_layers} layers is {total:.4g} layers, but the "
            f"{len(protected)} protected layers and budget.min_layer_ratio ({rule.min_layer_ratio}) of the others "
            f"need {fixed:.4g}"
        )


def layer_slots(log_weights: Sequence[float], num_tokens: int, rule: BudgetRule, size: Size) -> list[int]:
    """Slots `S_l` of each layer for a row that has seen `num_tokens` tokens.

    A protected layer gets `num_tokens` and is never evicted. With `exact_total` the sum is
    `floor(keep_ratio * L * T)`, except that no layer gets less than `min_layer_tokens`: a prompt of fewer
    may grow to it while decoding.

    Raises:
        ValueError: `keep_tokens` is exceeded by what the protected layers keep.
    """
    num_layers = len(log_weights)
    protected = rule.protected(num_layers)
    if size.keep_ratio is not None:
        base, ratio = num_tokens, size.keep_ratio
        total_tokens = floor_tokens(size.keep_ratio * num_layers * num_tokens)
    else:
        # An absolute budget does not shrink with a short prompt: the row may still grow up to it while decoding.
        base = max(num_tokens, size.keep_tokens)
        ratio = size.keep_tokens / base
        total_tokens = size.keep_tokens * num_layers
    # An absolute budget may be a smaller share of a long prompt than the minimum; then it is the minimum.
    minimum = rule.min_layer_ratio if size.keep_tokens is None else min(rule.min_layer_ratio, ratio)
    if rule.counts_minimum and len(protected) < num_layers:
        room = (ratio * num_layers - len(protected)) / (num_layers - len(protected))
        minimum = max(minimum, min(rule.min_layer_tokens / max(base, 1), room))
    low = [minimum] * num_layers
    high = [1.0] * num_layers
    for index in protected:
        low[index] = 1.0

    if rule.exact_total:
        if sum(low) > ratio * num_layers + 1e-9:
            raise ValueError(
                f"keep_tokens ({size.keep_tokens}) of {num_layers} layers is {total_tokens} tokens, but the "
                f"{len(protected)} protected layers alone keep {len(protected) * num_tokens} of {num_tokens} each"
            )
        ratios = water_fill(log_weights, ratio * num_layers, low, high)
        slots = [floor_tokens(r * base) for r in ratios]
        short = total_tokens - sum(slots)
        # Rounded, so that what is equal in exact arithmetic ties, and the lower layer gets it.
        remainders = [round(r * base - s, 9) for r, s in zip(ratios, slots, strict=True)]
        candidates = [i for i in range(num_layers) if slots[i] < base]
        for index in sorted(candidates, key=lambda i: (-remainders[i], i))[: max(short, 0)]:
            slots[index] += 1
    else:
        shares = [math.exp(w) * num_layers * ratio for w in log_weights]
        ratios = [min(max(share, lo), 1.0) for share, lo in zip(shares, low, strict=True)]
        slots = [floor_tokens(r * base) for r in ratios]
    return [max(s, rule.min_layer_tokens) for s in slots]
