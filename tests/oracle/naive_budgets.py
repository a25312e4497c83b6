"""Dispersion and layer budgets of the naive oracle: sections 1 and 2."""

from __future__ import annotations

import math

import torch

from .naive_config import OracleConfig, floor

MINMAX_EPSILON = 1e-6  # section 1: "+1e-6 in the denominator"
PYRAMID_BETA = 20


def layer_dispersions(column_sums: list[torch.Tensor], method: str, has_sinks: bool = False) -> list[float]:
    """`F_l` of every layer, from its column sums [Hq, T]."""
    # "Per-head variance F[h] = var_j c[h,j] (unbiased, divisor T-1)". READING: of a single token it is 0. The mean over
    # j is 1, as every row of the attention adds up to 1; of sampled sums "deviations are taken from 1" all the same.
    divisor = max(column_sums[0].shape[1] - 1, 1)
    # "With sinks a query gives less than 1 in all, and deviations are taken from the mean of c over j."
    from_mean = [sums - (sums.mean(dim=1, keepdim=True) if has_sinks else 1) for sums in column_sums]
    head_variances = [deviations.square().sum(dim=1) / divisor for deviations in from_mean]
    if method == "heads_minmax":
        # "min-max normalise F[h] across the heads of the layer (+1e-6 in the denominator), then mean over heads".
        return [float(((f - f.min()) / (f.max() - f.min() + MINMAX_EPSILON)).mean()) for f in head_variances]
    means = [float(f.mean()) for f in head_variances]
    if method == "raw":
        return means
    if method == "layers_minmax":
        # "mean over heads first, then min-max across the L layers". READING: with the same +1e-6.
        low, high = min(means), max(means)
        return [(m - low) / (high - low + MINMAX_EPSILON) for m in means]
    # Section 2, log_zscore: "log of the heads' mean, standardised across layers (unbiased deviation)".
    # READING: a mean of 0 counts as the smallest positive number; no spread (or one layer) gives 0 everywhere.
    logs = [math.log(max(m, 1e-300)) for m in means]
    centre = sum(logs) / len(logs)
    if len(logs) == 1:
        return [0.0]
    deviation = math.sqrt(sum((x - centre) ** 2 for x in logs) / (len(logs) - 1))
    return [(x - centre) / deviation if deviation > 0 else 0.0 for x in logs]


def layer_log_weights(config: OracleConfig, column_sums: list[torch.Tensor], has_sinks: bool = False) -> list[float]:
    """`log w_l` up to a constant. In logarithms, because `raw` underflows and the shares only need proportions."""
    num_layers = len(column_sums)
    # "Where fewer than min_layers layers share, they share equally."
    if config.allocation == "uniform" or (config.allocation == "dynamic" and num_layers < config.min_layers):
        return [0.0] * num_layers
    assert config.allocation != "ranked"
    if config.allocation == "profile":
        return [math.log(share) for share in config.profile]
    if config.allocation == "pyramid":
        # Linear in depth from (2 - 1/beta) to 1/beta of the average.
        if num_layers == 1:
            return [0.0]
        first, last = 2 - 1 / PYRAMID_BETA, 1 / PYRAMID_BETA
        return [math.log(first + (last - first) * layer / (num_layers - 1)) for layer in range(num_layers)]
    # "w = softmax_l(-F_l)", with dispersion_sign for the minus and `temperature` dividing the exponent.
    dispersions = layer_dispersions(column_sums, config.dispersion, has_sinks)
    return [config.dispersion_sign * f / config.temperature for f in dispersions]


def normalise(log_weights: list[float]) -> list[float]:
    top = max(log_weights)
    total = sum(math.exp(x - top) for x in log_weights)
    return [math.exp(x - top) / total for x in log_weights]


def protected_set(config: OracleConfig, num_layers: int) -> set[int]:
    for layer in config.protected_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"protected layer {layer} of {num_layers} layers")
    return {layer % num_layers for layer in config.protected_layers}


def water_fill(log_weights: list[float], keep_ratio: float, min_ratio: float, protected: set[int]) -> list[float]:
    """Ratios in [min_ratio, 1] whose sum is exactly `keep_ratio * L`, in proportion to `w` where no clamp is hit."""
    num_layers = len(log_weights)
    # "A total that the protected layers or the minima alone exceed is a clear error."
    if len(protected) + min_ratio * (num_layers - len(protected)) > keep_ratio * num_layers + 1e-9:
        raise ValueError(f"protected layers and minima alone exceed keep_ratio {keep_ratio}")
    # "protected layers are fixed at 1, layers that hit a clamp are fixed there, and the rest share what is left in
    # proportion to w, until no more clamp."
    fixed = {layer: 1.0 for layer in protected}
    while len(fixed) < num_layers:
        free = [layer for layer in range(num_layers) if layer not in fixed]
        left = keep_ratio * num_layers - sum(fixed.values())
        shares = dict(zip(free, [left * w for w in normalise([log_weights[layer] for layer in free])], strict=True))
        too_small = [layer for layer in free if shares[layer] < min_ratio]
        too_large = [layer for layer in free if shares[layer] > 1]
        if not too_small and not too_large:
            fixed.update(shares)
            break
        # Both clamps in one round: the side with the larger total violation first (as CSS flexbox resolves lengths).
        shortfall = sum(min_ratio - shares[layer] for layer in too_small)
        excess = sum(shares[layer] - 1 for layer in too_large)
        if shortfall >= excess:
            fixed.update({layer: min_ratio for layer in too_small})
        if excess >= shortfall:
            fixed.update({layer: 1.0 for layer in too_large})
    return [fixed[layer] for layer in range(num_layers)]


def layer_slots(config: OracleConfig, log_weights: list[float], num_tokens: int) -> tuple[list[int], list[float]]:
    """`S_l` and `r_l` of every layer (section 2)."""
    num_layers = len(log_weights)
    protected = protected_set(config, num_layers)
    if config.keep_ratio is not None:
        keep_ratio, length, min_ratio = config.keep_ratio, num_tokens, config.min_layer_ratio
    else:
        # Absolute budget: a share of max(T, keep_tokens), so that a short prompt's layers may grow to keep_tokens.
        length = max(num_tokens, config.keep_tokens)
        keep_ratio = config.keep_tokens / length
        min_ratio = min(config.min_layer_ratio, keep_ratio)
    if config.exact_total and config.allocation == "ranked" and len(protected) < num_layers:
        # "With `ranked` the least that each gets is part of the total, as far as the total goes."
        each = (keep_ratio * num_layers - len(protected)) / (num_layers - len(protected))
        min_ratio = max(min_ratio, min(config.min_layer_tokens / length, each))
    if config.exact_total:
        ratios = water_fill(log_weights, keep_ratio, min_ratio, protected)
        # "S_l = floor(r_l * T), and the tokens still short of floor(keep_ratio * L * T) go one each to the layers of
        # largest remainder (ties: lower layer)." Remainders are compared to nine digits, so that ties are ties.
        slots = [floor(r * length) for r in ratios]
        missing = floor(keep_ratio * num_layers * length) - sum(slots)
        remainders = [round(r * length - s, 9) for r, s in zip(ratios, slots, strict=True)]
        order = sorted(range(num_layers), key=lambda layer: (-remainders[layer], layer))
        for layer in [layer for layer in order if slots[layer] < length][: max(missing, 0)]:
            slots[layer] += 1
    else:
        # "r_l = clamp(w_l * L * keep_ratio, min_layer_ratio, 1)"; "protected_layers keep everything".
        ratios = [min(max(w * num_layers * keep_ratio, min_ratio), 1.0) for w in normalise(log_weights)]
        ratios = [1.0 if layer in protected else r for layer, r in enumerate(ratios)]
        slots = [floor(r * length) for r in ratios]
    # "last of all, S_l = max(S_l, min_layer_tokens). A prompt shorter than that may grow to it while decoding."
    return [max(s, config.min_layer_tokens) for s in slots], ratios
