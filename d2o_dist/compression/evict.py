"""Evictions of many layers at once, with one exchange between the ranks that hold their heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.compress import EvictionSteps
from d2o_dist.core.types import D2OState, Slots
from d2o_dist.kernels.backend import cuda_leaves, takes_cuda

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


def steps_in_place(
    slots: Slots,
    state: D2OState,
    config: D2OConfig,
    *,
    held: Sequence[int],
    kept: Sequence[int],
    num_seen: Sequence[int],
    all_heads_here: bool,
) -> EvictionSteps | None:
    """An eviction while decoding that writes `slots` and returns them; None unless CUDA C++ was chosen and serves them.

    Args:
        slots: [B, h, S, ...] buffers, each row's in `[0, held[row])` in order of position.
        held, kept, num_seen: slots of each row before and after, and the tokens that it has seen.
        all_heads_here: then nothing is asked of other ranks, and one launch does it all.

    Raises:
        ValueError: more slots a head than the kernel evicts at once.
    """
    if not takes_cuda(slots.keys, slots.values):
        return None
    from d2o_dist.kernels.cuda.evict import EvictionRows, cuda_evict_over_ranks, serves_eviction
    from d2o_dist.kernels.cuda.params import unserved_rule

    if (rule := unserved_rule(config)) is not None:
        cuda_leaves(f"evictions with {rule}")
        return None
    if not serves_eviction(slots):
        what = f"{slots.keys.shape[-1]} numbers in {slots.keys.dtype}"
        cuda_leaves(f"evictions of keys and values of {what}, which are not whole words of 16 bytes")
        return None
    splits = [config.split(after) if after < before else (before, 0) for before, after in zip(held, kept, strict=True)]
    rows = EvictionRows(held, *zip(*splits, strict=True), num_seen)
    steps = _at_once if all_heads_here else cuda_evict_over_ranks
    return steps(slots, rows, state, config)


def _at_once(slots: Slots, rows, state: D2OState, config: D2OConfig) -> EvictionSteps:
    from d2o_dist.kernels.cuda.evict import cuda_evict

    return slots, cuda_evict(slots, rows, state, config)
    yield  # it asks nothing, but is driven like those that do
