"""Evictions of many layers at once, with one exchange between the ranks that hold their heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2o_dist.core.compress import EvictionSteps
from d2o_dist.slots.slots import D2OState, Slots

# [B, h, X] of the heads at hand -> [B, H, X] of all heads, in the order of the heads; the same on every rank.
GatherHeads = Callable[[Tensor], Tensor]


def run_evictions(
    layers: Sequence[EvictionSteps], gather_heads: GatherHeads, nothing: Tensor | None = None
) -> list[tuple[Slots, D2OState]]:
    """Drive the evictions of several layers; what they ask of other ranks goes into one gather.

    Every rank must call it with the same layers in the same order: which rows are due follows from lengths alone.

    Args:
        nothing: what a rank takes part in the gather with whose layers ask nothing, where others' may; None: all ask.
    """
    results: dict[int, tuple[Slots, D2OState]] = {}
    asked: dict[int, Tensor] = {}
    for number, steps in enumerate(layers):
        try:
            asked[number] = next(steps)
        except StopIteration as end:
            results[number] = end.value
    if asked:
        everything = gather_heads(torch.cat(list(asked.values()), -1))
        parts = everything.split([reports.shape[-1] for reports in asked.values()], -1)
        for number, reports in zip(asked, parts, strict=True):
            try:
                layers[number].send(reports)
            except StopIteration as end:
                results[number] = end.value
            else:
                raise AssertionError("an eviction asks other ranks once")
    elif nothing is not None:
        gather_heads(nothing)
    return [results[number] for number in range(len(layers))]
