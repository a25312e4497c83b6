"""Checks that the public ops hand their arguments to the kernels as they hand them to PyTorch's operators."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.checks.common import OUT_LIMITS, STATISTICS_LIMIT, Check, Result, normal, using
from d2o_dist.attention.sampled import prompt_column_sums
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.column_peaks import column_peaks
from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.decode_attention import decode_attention, decode_with_logits
from d2o_dist.kernels.finish_decode import finish_decode, slot_probabilities
from d2o_dist.kernels.merge_into import merge_into
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.kernels.prefill_attention import cross_attention, prefill_attention
from d2o_dist.kernels.scored_decode import scored_decode
from d2o_dist.kernels.scored_prefill import scored_prefill_attention
from d2o_dist.policy.statistics import QuerySample

DTYPE = torch.bfloat16


def checks() -> list[Check]:
    """One for each public op."""
    return [Check("dispatch", case.__name__.strip("_"), lambda device, case=case: _run(case, device)) for case in CASES]


def _run(case: Callable[[str], tuple[Tensor, ...]], device: str) -> Result:
    """The op through all backends: everything it returns must agree. "auto" may be flash-attn."""
    results = {}
    for backend in ("triton", "auto", "torch"):
        with using(backend):
            results[backend] = case(device)
    result = Result()
    for backend in ("triton", "auto"):
        for number, (got, want) in enumerate(zip(results[backend], results["torch"], strict=True)):
            name = f"{backend}, result {number}"
            if got.is_floating_point():
                result.near(name, got, want, OUT_LIMITS[DTYPE] if got.dtype == DTYPE else STATISTICS_LIMIT)
            else:
                result.equal(name, got, want)
    return result


def _prompt(device: str, past: int = 24, queries: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    q = normal(2, 4, queries, 32, dtype=DTYPE, device=device)
    k, v = (normal(2, 2, past + queries, 32, dtype=DTYPE, device=device, seed=s) for s in (1, 2))
    return q, k, v


def _column_sums(device: str) -> tuple[Tensor, ...]:
    q, k, v = _prompt(device)
    lse = prefill_attention(q, k, v, 0.2, q_start=24)[1]
    options = ({}, {"num_last": 9}, {"query_stride": 8}, {"window": 20}, {"k_start": 7}, {"bias": k[..., 0].float()})
    return tuple(column_sums(q, k, lse, 0.2, q_start=24, **more) for more in options)


def _column_peaks(device: str) -> tuple[Tensor, ...]:
    q, k, v = _prompt(device)
    lse = prefill_attention(q, k, v, 0.2, q_start=24)[1]
    options = ({}, {"bias": k[..., 0].float()}, {"causal": False})
    return tuple(column_peaks(q, k, lse, 0.2, q_start=24, **more) for more in options)


def _prefill_attention(device: str) -> tuple[Tensor, ...]:
    q, k, v = _prompt(device)
    options = ({}, {"window": 20}, {"bias": k[..., 0].float()}, {"bias": k[..., 0].float(), "window": 30})
    return tuple(x for more in options for x in prefill_attention(q, k, v, 0.2, q_start=24, **more))


def _scored_prefill(device: str) -> tuple[Tensor, ...]:
    return scored_prefill_attention(*_prompt(device), 0.2, q_start=24)


def _cross_attention(device: str) -> tuple[Tensor, ...]:
    q, k, v = _prompt(device)
    bias = k[..., 0].float()
    bias[:, :, ::5] = -torch.inf
    return *cross_attention(q, k, v, 0.2), *cross_attention(q, k, v, 0.2, bias=bias)


def _sampled_column_sums(device: str) -> tuple[Tensor, ...]:
    q, k, v = _prompt(device, past=0, queries=90)
    lse = prefill_attention(q, k, v, 0.2)[1]
    samples = (8, 20), (7, 0), (100, 3)
    return tuple(prompt_column_sums(q, k, lse, Softmax(0.2), QuerySample(*sample)) for sample in samples)


def _decode_attention(device: str) -> tuple[Tensor, ...]:
    q, k, v = _prompt(device)
    valid = normal(2, 64, dtype=torch.float32, device=device, seed=3) > 0
    arguments, mass = (q[:, :, 0], k, v, 0.2), k[..., 0].float()
    per_head = valid.unsqueeze(1).expand(2, 2, 64)
    return (
        *decode_attention(*arguments, valid=valid, log_mass=mass),
        *decode_with_logits(*arguments, valid=per_head),
        *decode_attention(*arguments),
    )


def _finish_decode(device: str) -> tuple[Tensor, ...]:
    logits = normal(2, 4, 30, dtype=torch.float32, device=device)
    lse = logits.logsumexp(-1)
    scores, rates = torch.ones(2, 2, 2, 30, device=device)
    newest, present = torch.tensor([[29], [3]], device=device), torch.tensor([True, False], device=device)
    parts = normal(3, 2, 4, 20, dtype=torch.float32, device=device, seed=1)
    lses, sinks = normal(3, 2, 4, dtype=torch.float32, device=device, seed=2), torch.ones(1, 4, device=device)
    options = dict(num_kv_heads=2, scores=scores, rates=rates, newest=newest, rate_window=8, present=present)
    out = finish_decode(parts, lses, logits, DTYPE, sinks=sinks, **options)
    return slot_probabilities(logits, lse, 2), out, scores, rates


def _scored_decode(device: str) -> tuple[Tensor, ...]:
    q, k, v = _prompt(device)
    newest, present = torch.tensor([[50], [11]], device=device), torch.tensor([True, False], device=device)
    valid, mass = torch.arange(64, device=device) <= newest, k[..., 0].float().abs()
    found = []
    new, sinks = (k[:, :, 3], v[:, :, 5]), torch.ones(1, 4, device=device)
    told = {"present": present, "log_mass": mass}, {"peaks": True, "new": new}, {"sinks": sinks, "softcap": 1.0}
    for more in ({}, *told):
        scores, rates = torch.ones(2, 2, 2, 64, device=device)
        statistics = {"scores": scores, "rates": rates, "rate_window": 8}
        found += [scored_decode(q[:, :, 0], k, v, 0.2, valid=valid, newest=newest, **statistics, **more), scores, rates]
    return tuple(found)


def _nearest_kept(device: str) -> tuple[Tensor, ...]:
    _, evicted, kept = _prompt(device)
    many = [normal(2, size, 16, dtype=DTYPE, device=device, seed=size) for size in (2100, 2000)]
    few = many[1][..., 0] > 1
    few[1] = False
    cases = ((*many, few), (evicted[0, 0], kept[0, 0], None), (evicted, kept, kept[..., 0] > 0), (evicted, kept, None))
    return tuple(x for case in cases for x in _chosen(*case))


def _chosen(evicted: Tensor, kept: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity, the cosine with the key that was chosen, and whether that is a target.

    Not the index: two keys that are equally near up to rounding may change places between backends.
    """
    similarity, index = nearest_kept(evicted, kept, mask)
    key = kept.gather(-2, index.unsqueeze(-1).expand_as(evicted))
    is_target = torch.ones_like(index, dtype=torch.bool) if mask is None else mask.gather(-1, index)
    return similarity, torch.cosine_similarity(evicted.float(), key.float(), dim=-1), is_target


def _merge_into(device: str) -> tuple[Tensor, ...]:
    _, evicted, kept = _prompt(device)
    kept, weight = kept[:, :, :10], evicted[..., 0].float().abs()
    target = (torch.arange(64, device=device) ** 2 % 11).clamp_max(9).expand(2, 2, 64)
    options = (dict(own=2.7), dict(own=kept[..., 0].float().abs() + 1, share=torch.ones_like(weight)))
    found = [merge_into((kept,), (evicted,), weight, target, evicted[..., 1] > 0, **more) for more in options]
    return tuple(x for means, total, touched in found for x in (*means, total, touched))


CASES = (
    _column_sums,
    _column_peaks,
    _prefill_attention,
    _cross_attention,
    _scored_prefill,
    _sampled_column_sums,
    _decode_attention,
    _finish_decode,
    _scored_decode,
    _nearest_kept,
    _merge_into,
)
