"""Slots of the naive oracle, and what merging makes of them: section 4."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .naive_config import OracleConfig


@dataclass
class Slot:
    key: torch.Tensor
    value: torch.Tensor
    position: int
    score: float = 0.0
    rate: float = 0.0
    log_mass: float = 0.0


@dataclass
class Eviction:
    """What one eviction of one layer did; per KV head, in position order. For looking at when a comparison fails."""

    layer: int
    num_seen_tokens: int
    evicted: list[list[int]]
    similarity: list[list[float]]
    target: list[list[int]]
    merged: list[list[bool]]
    threshold: float | None


def unit(keys: list[torch.Tensor]) -> torch.Tensor:
    """ "Zero-norm keys have cosine 0." """
    stacked = torch.stack(keys)
    norms = stacked.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, stacked / norms, torch.zeros_like(stacked))


def nearest_targets(evicted: list[Slot], targets: list[Slot]) -> list[tuple[float, int]]:
    """ "u_i = max over kept j of cos(k_i, k_j), j*(i) its argmax (ties: lowest position)"; targets in position order.

    Without a target the similarity is -inf, which no gate lets through.
    """
    if not targets or not evicted:
        return [(-math.inf, 0) for _ in evicted]
    cosines = (unit([s.key for s in evicted]) @ unit([t.key for t in targets]).T).tolist()
    return [(max(row), row.index(max(row))) for row in cosines]


def merge_into(config: OracleConfig, target: Slot, sources: list[Slot], similarity: list[float]) -> None:
    """Merge into the kept slot j = `target` the tokens M_j = `sources` gated to it."""
    if config.merge == "mass":
        # Section 4b: "m = r_j + sum r_i; v_j <- (r_j v_j + sum r_i v_i) / m;
        # log_mass_j <- min(log_mass_j + log(m / r_j), max_log_mass = 3); r_j <- m; the key stays as it is".
        m = target.rate + sum(s.rate for s in sources)
        if m == 0:  # READING: every probability underflowed, so there is nothing to weigh
            return
        target.value = (target.rate * target.value + sum(s.rate * s.value for s in sources)) / m
        growth = math.log(m / target.rate) if target.rate > 0 else math.inf
        target.log_mass = min(target.log_mass + growth, config.max_log_mass)
        target.rate = m
        return
    if config.merge == "released":
        # Section 6: "kept j becomes the mean of itself and the u_i * k_i merged into it (scatter_reduce(mean,
        # include_self)), the same for v".
        n = 1 + len(sources)
        target.key = (target.key + sum(u * s.key for u, s in zip(similarity, sources, strict=True))) / n
        target.value = (target.value + sum(u * s.value for u, s in zip(similarity, sources, strict=True))) / n
        return
    # "k_j <- (e*k_j + sum exp(u_i) k_i) / (e + sum exp(u_i)), the same for v_j ... Position and score of j stay".
    weights = [math.exp(u) for u in similarity]
    own = config.self_weight
    total = own + sum(weights)
    target.value = (own * target.value + sum(w * s.value for w, s in zip(weights, sources, strict=True))) / total
    if config.merge == "keys_values":
        target.key = (own * target.key + sum(w * s.key for w, s in zip(weights, sources, strict=True))) / total


def snapshot(layers_of_heads: list[list[list[Slot]]]) -> list[dict[str, torch.Tensor]]:
    """Per layer, in position order: positions [Hkv, S] int64, keys and values [Hkv, S, D], scores, rates, log_mass
    [Hkv, S] float64. A head that holds less than another ends in slots of position -1 with zeros."""
    entries = []
    for heads in layers_of_heads:
        width, first = max(len(slots) for slots in heads), heads[0][0]
        none = Slot(torch.zeros_like(first.key), torch.zeros_like(first.value), -1)
        heads = [slots + [none] * (width - len(slots)) for slots in heads]
        entry = {
            "positions": torch.tensor([[s.position for s in slots] for slots in heads]),
            "keys": torch.stack([torch.stack([s.key for s in slots]) for slots in heads]),
            "values": torch.stack([torch.stack([s.value for s in slots]) for slots in heads]),
        }
        for name, attribute in (("scores", "score"), ("rates", "rate"), ("log_mass", "log_mass")):
            numbers = [[getattr(s, attribute) for s in slots] for slots in heads]
            entry[name] = torch.tensor(numbers, dtype=torch.float64)
        entries.append(entry)
    return entries
