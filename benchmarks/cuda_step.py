"""What CUDA C++ does of a decode step, beside what serves it without: the eviction, the scores, the append."""

from collections.abc import Callable

import torch

from benchmarks.checks.common import Result
from benchmarks.groups import Group, Shape, out_limit
from benchmarks.layer import DecodeLayer
from benchmarks.roofline import Work, eviction_work
from d2o_dist.kernels.update_scores import update_scores
from d2o_dist.policy.config import D2OConfig

PRESETS = ("d2o", "paper_minmax", "h2o")
GATE_LENGTH = 700
_NAMES = ("keys", "values", "positions", "scores", "rates", "log_mass")


def cuda_group(shape: Shape) -> Group:
    """One layer at `keep_ratio` of its prompt, `eviction_interval` slots over its budget: each case twice."""
    cases: dict[str, Callable[[], object]] = {}
    work: dict[str, Work] = {}
    interval = D2OConfig().eviction_interval
    for preset in PRESETS:
        layers = [_layer(preset, shape, shape.length) for _ in range(shape.copies)]
        cases[f"eviction, {preset}"] = lambda layers=layers: [_evict(layer, in_cuda=False) for layer in layers]
        cases[f"eviction, {preset}, CUDA C++"] = lambda layers=layers: [_evict(layer, in_cuda=True) for layer in layers]
        merges = D2OConfig.preset(preset).merge != "none"
        needs = eviction_work(shape.heads[1], shape.head_dim, shape.num_kept, interval, shape.dtype.itemsize, merges)
        work |= {f"eviction, {preset}": needs, f"eviction, {preset}, CUDA C++": needs}
    layers = [_layer("d2o", shape, shape.length) for _ in range(shape.copies)]
    width = layers[0].layer.store.capacity
    logits = torch.randn(1, shape.heads[0], width, device=shape.device)
    newest = torch.full((1,), width - 1, device=shape.device)
    keys = shape.normal(1, shape.heads[1], shape.head_dim)
    lse = logits.logsumexp(-1)
    cases["scores"] = lambda: [_score(layer, logits, lse, newest, in_cuda=False) for layer in layers]
    cases["scores, CUDA C++"] = lambda: [_score(layer, logits, lse, newest, in_cuda=True) for layer in layers]
    cases["append"] = lambda: [_append(layer, keys, newest, width - 1, in_cuda=False) for layer in layers]
    cases["append, CUDA C++"] = lambda: [_append(layer, keys, newest, width - 1, in_cuda=True) for layer in layers]
    calls = dict.fromkeys(cases, shape.copies)
    targets = [(f"{name}, CUDA C++", name, 1.0) for name in cases if not name.endswith("CUDA C++")]
    return Group("cuda", cases, "eviction, d2o", lambda: cuda_gate(shape), calls, work, targets)


def cuda_gate(shape: Shape) -> Result:
    """Slots after an eviction, scores and rates after a step, a token appended: as without CUDA C++."""
    result = Result()
    for preset in PRESETS:
        one, two = (_layer(preset, shape, GATE_LENGTH) for _ in range(2))
        _evict(one, in_cuda=False)
        _evict(two, in_cuda=True)
        for name in _NAMES:
            got, want = (getattr(layer.layer.store.slots, name) for layer in (two, one))
            result.near(f"{preset} {name}", got, want, out_limit(shape.dtype))
    one, two = (_layer("d2o", shape, GATE_LENGTH) for _ in range(2))
    width = one.layer.store.capacity
    logits, newest = torch.randn(1, shape.heads[0], width, device=shape.device), torch.tensor([3], device=shape.device)
    keys = shape.normal(1, shape.heads[1], shape.head_dim)
    for layer, in_cuda in ((one, False), (two, True)):
        _append(layer, keys, newest, 3, in_cuda=in_cuda)
        _score(layer, logits, logits.logsumexp(-1), newest, in_cuda=in_cuda)
    for name in _NAMES:
        got, want = (getattr(layer.layer.store.buffers, name) for layer in (two, one))
        result.near(f"step {name}", got, want, out_limit(shape.dtype))
    return result


def _layer(preset: str, shape: Shape, length: int) -> DecodeLayer:
    config = D2OConfig.preset(preset, keep_ratio=shape.keep_ratio)
    return DecodeLayer.full(config, shape.heads, length, shape.head_dim, shape.dtype, shape.device)


def _evict(layer: DecodeLayer, *, in_cuda: bool) -> None:
    layer.fill()
    if not in_cuda:
        layer.evict()
        return
    from d2o_dist.kernels.cuda.evict import EvictionRows, cuda_evict

    one, heavy, recent = layer.layer, layer.budget.num_heavy, layer.budget.num_recent
    rows = EvictionRows(one.kv_len, (heavy,), (recent,), (layer.seen,))
    one.state = cuda_evict(one.store.buffers, rows, one.state, layer.config)
    one.store.kv_len = [heavy + recent]


def _score(layer: DecodeLayer, logits, lse, newest, *, in_cuda: bool) -> None:
    slots = layer.layer.store.buffers
    if not in_cuda:
        update_scores(logits, lse, slots.scores, slots.rates, newest=newest)
        return
    from d2o_dist.kernels.cuda.update_scores import cuda_update_scores

    cuda_update_scores(
        logits, lse, slots.scores.shape[1], scores=slots.scores, rates=slots.rates, newest=newest, decay=1 / 32,
        present=None, with_probs=False,
    )  # fmt: skip


def _append(layer: DecodeLayer, keys, index, place: int, *, in_cuda: bool) -> None:
    """A token at slot `place`, which is what the tensor `index` [1] holds: without CUDA C++ the host must know it."""
    slots = layer.layer.store.buffers
    if in_cuda:
        from d2o_dist.kernels.cuda.append import cuda_append

        cuda_append(slots, keys, keys, index, index)
        return
    slots.keys[:, :, place], slots.values[:, :, place], slots.positions[:, :, place] = keys, keys, place
    for statistic in (slots.scores, slots.rates, slots.log_mass):
        statistic[:, :, place] = 0
