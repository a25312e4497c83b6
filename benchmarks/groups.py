"""What is timed together: a baseline, cases beside it, a gate of correctness, and the ratios to reach."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.checks.common import OUT_LIMITS, STATISTICS_LIMIT, Result
from benchmarks.layer import DecodeLayer, finalize_layer, random_slots
from benchmarks.roofline import Work, decode_work, merge_work, nearest_work, prefill_work
from benchmarks.timing import captured
from d2o_dist.attention.prefill import chunk_attention
from d2o_dist.attention.sampled import naive_prompt_column_sums, prompt_column_sums
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.decode_attention import decode_attention, decode_with_logits, naive_decode_with_logits
from d2o_dist.kernels.finish_decode import finish_decode
from d2o_dist.kernels.merge_into import merge_into, naive_merge_into
from d2o_dist.kernels.nearest_kept import naive_nearest_kept, nearest_kept
from d2o_dist.kernels.prefill_attention import prefill_attention
from d2o_dist.kernels.scored_decode import scored_decode
from d2o_dist.kernels.scored_prefill import naive_scored_prefill_attention, scored_prefill_attention
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.statistics import QuerySample

GATE_LENGTH = 300
# What decode steps and evictions are timed under, by name in the tables.
POLICIES = {
    "d2o": {"preset": "d2o"},
    "paper, every 16 tokens": {"preset": "paper", "eviction_interval": 16},
}
SAMPLE = QuerySample(stride=8, near=64)
STRIDED = f"with sums strided by {SAMPLE.stride}"


@dataclass(frozen=True)
class Shape:
    """One layer of a model, one row. copies: buffers that a decode step goes through in turn, so that none stays in a
    cache between two steps."""

    name: str
    heads: tuple[int, int]
    head_dim: int
    length: int
    dtype: torch.dtype
    device: str
    keep_ratio: float = 0.2
    copies: int = 1

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(self.dtype)

    def inputs(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [1, Hq, T, D], k and v [1, Hkv, T, D]."""
        counts = (self.heads[0], self.heads[1], self.heads[1])
        return tuple(self.normal(1, count, length, self.head_dim) for count in counts)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def num_kept(self) -> int:
        return int(self.keep_ratio * self.length)


@dataclass
class Group:
    """cases[name]() does `calls` calls. targets: (case, its base, the most it may take of the base's time)."""

    name: str
    cases: dict[str, Callable[[], object]]
    baseline: str
    gate: Callable[[], Result]
    calls: dict[str, int] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)
    targets: list[tuple[str, str, float]] = field(default_factory=list)


def prefill_group(shape: Shape) -> Group:
    """Attention alone, with the lse, with exact column sums, with those of every eighth query; the sums alone."""
    q, k, v = shape.inputs(shape.length)
    grouped, size = shape.heads[0] != shape.heads[1], shape.dtype.itemsize
    _, lse = prefill_attention(q, k, v, shape.scale)
    case = (shape.heads, shape.head_dim, shape.length, size)
    return Group(
        "prefill",
        {
            "SDPA": lambda: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=shape.scale, enable_gqa=grouped
            ),
            "with lse": lambda: prefill_attention(q, k, v, shape.scale),
            "with column sums": lambda: scored_prefill_attention(q, k, v, shape.scale),
            STRIDED: lambda: chunk_attention(q, k, v, Softmax(shape.scale), with_sums=True, sample=SAMPLE),
            "column sums alone": lambda: column_sums(q, k, lse, shape.scale),
        },
        "SDPA",
        lambda: prefill_gate(shape),
        work={
            "SDPA": prefill_work(*case),
            "with lse": prefill_work(*case),
            "column sums alone": prefill_work(*case, matmuls=1),
        },
        targets=[("with column sums", "SDPA", 1.6), (STRIDED, "SDPA", 1.15)],
    )


def prefill_gate(shape: Shape) -> Result:
    """Output, lse and sums, exact and strided, of a short prompt against the oracle in float64."""
    q, k, v = shape.inputs(GATE_LENGTH)
    wide = [x.cpu().double() for x in (q, k, v)]
    result = Result()
    found = scored_prefill_attention(q, k, v, shape.scale)
    want = naive_scored_prefill_attention(*wide, shape.scale)
    sampled = prompt_column_sums(q, k, prefill_attention(q, k, v, shape.scale)[1], Softmax(shape.scale), SAMPLE)
    want_sampled = naive_prompt_column_sums(*wide[:2], want[1], Softmax(shape.scale), SAMPLE)
    limits = (out_limit(shape.dtype), lse_limit(shape), *(lse_limit(shape) * 4,) * 2)
    names = ("out", "lse", "sums", "strided sums")
    for name, got, expected, limit in zip(names, (*found, sampled), (*want, want_sampled), limits, strict=True):
        result.near(name, got, expected, limit)
    return result


def out_limit(dtype: torch.dtype) -> float:
    """Of an output against its oracle; float64 is held to float32's."""
    return OUT_LIMITS.get(dtype, OUT_LIMITS[torch.float32])


def lse_limit(shape: Shape) -> float:
    """PyTorch's flash kernel on a CPU has an exponential that is good to 1e-4 in half precision."""
    return 3e-4 if shape.device == "cpu" and shape.dtype.itemsize == 2 else STATISTICS_LIMIT


def decode_group(shape: Shape) -> Group:
    """One new token: over the full cache, over the kept slots, with all that D2O does besides, evictions included."""
    grouped, interval = shape.heads[0] != shape.heads[1], D2OConfig().eviction_interval
    full, kept, layers = [], [], {name: [] for name in POLICIES}
    for _ in range(shape.copies):
        q, k, v = shape.inputs(shape.length)
        q = q[:, :, :1].contiguous()
        full.append((q, k, v))
        kept.append((q, *(x[:, :, : shape.num_kept].contiguous() for x in (k, v))))
        for policy, built in layers.items():
            config = D2OConfig.from_dict({**POLICIES[policy], "keep_ratio": shape.keep_ratio})
            built.append(DecodeLayer.full(config, shape.heads, shape.length, shape.head_dim, shape.dtype, shape.device))

    def sdpa(buffers: list) -> None:
        for q, k, v in buffers:
            F.scaled_dot_product_attention(q, k, v, scale=shape.scale, enable_gqa=grouped)

    valid = torch.ones(1, shape.num_kept, dtype=torch.bool, device=shape.device)
    newest = torch.tensor([[shape.num_kept - 1]], device=shape.device)

    def attend() -> None:
        for q, k, v in kept:
            decode_attention(q[:, :, 0], k, v, shape.scale)

    def attend_and_score() -> None:
        for (q, k, v), layer in zip(kept, layers["d2o"], strict=True):
            scores = layer.block.store.buffers.scores[:, :, : shape.num_kept]
            scored_decode(q[:, :, 0], k, v, shape.scale, valid=valid, newest=newest, scores=scores)

    def steps(policy: str) -> None:
        for _ in range(interval):
            for (q, k, v), layer in zip(full, layers[policy], strict=True):
                layer.step(q, k[:, :, :1], v[:, :, :1])

    def plain(policy: str) -> None:
        for (q, k, v), layer in zip(full, layers[policy], strict=True):
            layer.attend(q, k[:, :, :1], v[:, :, :1])

    def evict() -> None:
        for layer in layers["d2o"]:
            layer.fill()
            layer.evict()

    cases = {
        "SDPA, full cache": lambda: sdpa(full),
        "SDPA, kept slots": lambda: sdpa(kept),
        "attention": attend,
        "attention and scores": attend_and_score,
    }
    targets = []
    if shape.device != "cpu":
        cases |= {f"{name}, CUDA graph": captured(run) for name, run in cases.items()}
        targets = [
            ("attention and scores, CUDA graph", "SDPA, kept slots, CUDA graph", 1.10),
            ("attention and scores, CUDA graph", "SDPA, full cache, CUDA graph", 1 / 4),
        ]
    attending = list(cases)
    cases |= {f"plain step, {policy}": lambda policy=policy: plain(policy) for policy in layers}
    if shape.device != "cpu":
        for policy in layers:
            cases[f"plain step, {policy}, CUDA graph"] = captured(lambda policy=policy: plain(policy))
            targets.append((f"plain step, {policy}, CUDA graph", "SDPA, kept slots, CUDA graph", 1.10))
    cases |= {f"whole step, {policy}": lambda policy=policy: steps(policy) for policy in layers}
    cases["one eviction"] = evict
    full_work = decode_work(shape.heads, shape.head_dim, shape.length, shape.dtype.itemsize)
    kept_work = decode_work(shape.heads, shape.head_dim, shape.num_kept, shape.dtype.itemsize)
    return Group(
        "decode",
        cases,
        "SDPA, full cache",
        lambda: decode_gate(shape),
        {name: shape.copies * (interval if name.startswith("whole step") else 1) for name in cases},
        {name: full_work if "full" in name else kept_work for name in attending},
        [*targets, *((f"whole step, {policy}", "SDPA, full cache", 1 / 3.5) for policy in layers)],
    )


def decode_gate(shape: Shape) -> Result:
    """Output, lse, logits, scores and rates of one step against the oracles in float64."""
    q, k, v = shape.inputs(GATE_LENGTH)
    q, mass = q[:, :, 0].contiguous(), k[..., 0].float().abs()
    out, lse, logits = decode_with_logits(q, k, v, shape.scale, log_mass=mass)
    want = naive_decode_with_logits(*(x.cpu().double() for x in (q, k, v)), shape.scale, log_mass=mass.cpu().double())
    result = Result()
    for name, got, expected in zip(("out", "lse", "logits"), (out, lse, logits), want, strict=True):
        result.near(name, got, expected, out_limit(shape.dtype) if name == "out" else STATISTICS_LIMIT)
    probs = (want[2] - want[1].unsqueeze(-1)).exp().unflatten(1, (shape.heads[1], -1)).sum(2)
    aged = 0.75 + probs / 4
    aged[:, :, -1] = probs[:, :, -1]
    newest = torch.tensor([[GATE_LENGTH - 1]], device=shape.device)
    valid = torch.ones(1, GATE_LENGTH, dtype=torch.bool, device=shape.device)
    statistics = torch.ones(2, 2, *k.shape[:3], device=shape.device, dtype=logits.dtype)
    finish_decode(
        out.to(lse.dtype)[None], lse[None], logits, shape.dtype, num_kv_heads=shape.heads[1], scores=statistics[0, 0],
        rates=statistics[0, 1], newest=newest, rate_window=4,
    )  # fmt: skip
    scored = scored_decode(
        q, k, v, shape.scale, valid=valid, newest=newest, log_mass=mass, scores=statistics[1, 0],
        rates=statistics[1, 1], rate_window=4,
    )  # fmt: skip
    result.near("out of a step", scored, want[0], out_limit(shape.dtype))
    for name, (scores, rates) in zip(("", " of a step"), statistics, strict=True):
        result.near(f"scores{name}", scores, 1 + probs, STATISTICS_LIMIT)
        result.near(f"rates{name}", rates, aged, STATISTICS_LIMIT)
    return result


def evict_group(shape: Shape) -> Group:
    """The end of a prompt: nearest kept keys, merging, and the whole eviction, beside the attention of that layer."""
    q, k, v = shape.inputs(shape.length)
    slots = random_slots(shape.heads[1], shape.length, shape.head_dim, shape.dtype, shape.device)
    kept, evicted = slots.keys[:, :, : shape.num_kept], slots.keys[:, :, shape.num_kept :]
    similarity, target = nearest_kept(evicted, kept)
    merged = similarity > similarity.mean()
    weight = similarity.exp()
    sizes = (evicted.shape[2], shape.num_kept, shape.dtype.itemsize)
    cases = {
        "attention with column sums": lambda: scored_prefill_attention(q, k, v, shape.scale),
        "nearest kept": lambda: nearest_kept(evicted, kept),
        "merge into": lambda: merge_into((kept, kept), (evicted, evicted), weight, target, merged, 2.718281828),
    }
    for policy, fields in POLICIES.items():
        config = D2OConfig.from_dict({**fields, "keep_ratio": shape.keep_ratio})
        cases[f"whole eviction, {policy}"] = lambda config=config: finalize_layer(slots, config)
    return Group(
        "evict",
        cases,
        "attention with column sums",
        lambda: evict_gate(shape),
        work={
            "nearest kept": nearest_work(shape.heads[1], shape.head_dim, *sizes),
            "merge into": merge_work(shape.heads[1], shape.head_dim, int(merged.sum()) // shape.heads[1], *sizes[1:]),
        },
        targets=[(f"whole eviction, {policy}", "attention with column sums", 1.0) for policy in POLICIES],
    )


def evict_gate(shape: Shape) -> Result:
    """Nearest keys and merged rows of a short prompt against the oracles in float64."""
    slots = random_slots(shape.heads[1], GATE_LENGTH, shape.head_dim, shape.dtype, shape.device)
    kept, evicted = slots.keys[:, :, :60], slots.keys[:, :, 60:]
    similarity, target = nearest_kept(evicted, kept)
    result = Result()
    result.near("similarity", similarity, naive_nearest_kept(*_wide(evicted, kept))[0], STATISTICS_LIMIT)
    merged, weight = similarity > similarity.mean(), similarity.exp()
    means, total, _ = merge_into((kept,), (evicted,), weight, target, merged, 2.7)
    want = naive_merge_into(*((x,) for x in _wide(kept, evicted)), *_wide(weight), target.cpu(), merged.cpu(), 2.7)
    result.near("merged", means[0], want[0][0], out_limit(shape.dtype))
    result.near("total", total, want[1], STATISTICS_LIMIT)
    return result


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.cpu().double() for x in tensors]


GROUPS: dict[str, Callable[[Shape], Group]] = {
    "prefill": prefill_group,
    "decode": decode_group,
    "evict": evict_group,
}
