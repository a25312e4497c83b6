"""How many slots each layer gets (paper section 3.2, eq. 4-5, made exact). All of it on the host, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig, floor_tokens


def layer_log_weights(dispersions: Tensor | None, config: D2OConfig, num_layers: int) -> list[float]:
    """Log of each layer's share of the total, before clamps; normalised: `logsumexp = 0`.

    Args:
        dispersions: [L]; read only by `allocation="dynamic"`. `allocation="ranked"` is `ranked_log_weights`.
    """
    assert config.allocation != "ranked"
    if config.allocation == "dynamic":
        assert dispersions is not None and dispersions.numel() == num_layers
        raw = dispersions.double().cpu().numpy() * (config.dispersion_sign / config.temperature)
    elif config.allocation == "pyramid":
        low = 1 / config.pyramid_beta
        depth = np.arange(num_layers) / max(num_layers - 1, 1) if num_layers > 1 else np.array([0.5])
        raw = np.log(2 - low - (2 - 2 * low) * depth)
    else:
        raw = np.zeros(num_layers)
    peak = raw.max()
    return list(raw - peak - math.log(np.exp(raw - peak).sum()))


def num_ranked(num_tokens: int, num_heads: int, config: D2OConfig) -> int:
    """How many of the highest ranked tokens decide the shares of a row: the budget's fraction of the `num_tokens`
    tokens of `num_heads` KV heads in all layers, at least 1."""
    ratio = config.keep_ratio or min(config.keep_tokens / max(num_tokens, 1), 1.0)
    return max(floor_tokens(ratio * num_heads * num_tokens), 1)


def ranked_log_weights(counts: Sequence[int]) -> list[float]:
    """Log of each layer's share where layers share by rank; counts: of the highest ranked tokens, each layer's own."""
    shares = torch.tensor(counts, dtype=torch.float64)
    # A layer without any gets the least there is; its logarithm must be finite. A row without tokens has none anywhere.
    return (shares / shares.sum().clamp_min(1)).clamp_min(torch.finfo(torch.float64).tiny).log().tolist()


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


def check_total(config: D2OConfig, num_layers: int) -> None:
    """Refuse a total that the protected layers and the minima of the others alone exceed.

    Raises:
        ValueError: names the total and what is fixed.
    """
    protected = config.protected(num_layers)
    if not config.exact_total or config.keep_ratio is None:
        return
    total = config.keep_ratio * num_layers
    fixed = len(protected) + (num_layers - len(protected)) * config.min_layer_ratio
    if fixed > total + 1e-9:
        raise ValueError(
            f"keep_ratio ({config.keep_ratio}) of {num_layers} layers is {total:.4g} layers, but the "
            f"{len(protected)} protected layers and min_layer_ratio ({config.min_layer_ratio}) of the others need "
            f"{fixed:.4g}"
        )


def layer_slots(log_weights: Sequence[float], num_tokens: int, config: D2OConfig) -> list[int]:
    """Slots `S_l` of each layer for a row that has seen `num_tokens` tokens.

    A protected layer gets `num_tokens` and is never evicted. With `exact_total` the sum is
    `floor(keep_ratio * L * T)`, except that no layer gets less than `min_layer_tokens`: a prompt of fewer
    may grow to it while decoding.

    Raises:
        ValueError: `keep_tokens` is exceeded by what the protected layers keep.
    """
    num_layers = len(log_weights)
    protected = config.protected(num_layers)
    if config.keep_ratio is not None:
        base, ratio = num_tokens, config.keep_ratio
        total_tokens = floor_tokens(config.keep_ratio * num_layers * num_tokens)
    else:
        # An absolute budget does not shrink with a short prompt: the row may still grow up to it while decoding.
        base = max(num_tokens, config.keep_tokens)
        ratio = config.keep_tokens / base
        total_tokens = config.keep_tokens * num_layers
    # An absolute budget may be a smaller share of a long prompt than the minimum; then it is the minimum.
    minimum = config.min_layer_ratio if config.keep_tokens is None else min(config.min_layer_ratio, ratio)
    low = [minimum] * num_layers
    high = [1.0] * num_layers
    for index in protected:
        low[index] = 1.0

    if config.exact_total:
        if sum(low) > ratio * num_layers + 1e-9:
            raise ValueError(
                f"keep_tokens ({config.keep_tokens}) of {num_layers} layers is {total_tokens} tokens, but the "
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
    return [max(s, config.min_layer_tokens) for s in slots]
