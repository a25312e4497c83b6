"""Calls of real shapes, on meta tensors, for `tests.kernels.compiling`: what Llama-3-8B and Qwen2.5-7B would launch."""

from __future__ import annotations

import torch

MODELS = {"llama3_8b": (32, 8, 128), "qwen25_7b": (28, 4, 128)}


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _column_sums(heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16, **options):
    def call():
        from d2o_dist.kernels.column_sums.triton import triton_column_sums

        length = 32768
        defaults = dict(q_start=0, k_start=0, q_step=1, bias=None, causal=True, window=None)
        if options.pop("with_bias", False):
            defaults["bias"] = _meta(1, kv_heads, length, dtype=torch.float32)
        q, k = _meta(1, heads, length, dim, dtype=dtype), _meta(1, kv_heads, length, dim, dtype=dtype)
        triton_column_sums(q, k, _meta(1, heads, length, dtype=torch.float32), 0.1, **(defaults | options))

    return call


def _column_peaks(heads: int, kv_heads: int, dim: int, dtype=torch.bfloat16, *, bias=False, causal=False):
    def call():
        from d2o_dist.kernels.column_peaks.triton import triton_column_peaks

        length, queries = 32768, 2048
        q, k = _meta(1, heads, queries, dim, dtype=dtype), _meta(1, kv_heads, length, dim, dtype=dtype)
        mass = _meta(1, kv_heads, length, dtype=torch.float32) if bias else None
        lse = _meta(1, heads, queries, dtype=torch.float32)
        triton_column_peaks(q, k, lse, 0.1, q_start=length - queries, bias=mass, causal=causal)

    return call


def _prefill(heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16, *, bias=False, **options):
    def call():
        from d2o_dist.kernels.prefill_attention.triton import triton_prefill_attention

        length, queries = 32768, 4096
        q, k = _meta(1, heads, queries, dim, dtype=dtype), _meta(1, kv_heads, length, dim, dtype=dtype)
        mass = _meta(1, kv_heads, length, dtype=torch.float32) if bias else None
        defaults = dict(q_start=length - queries, window=None, bias=mass)
        triton_prefill_attention(q, k, k, 0.1, **(defaults | options))

    return call


def _decode(heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16, *, masked=True):
    def call():
        from d2o_dist.kernels.decode_attention.triton import triton_decode_attention

        rows = (1, kv_heads, 6568)
        k = _meta(*rows, dim, dtype=dtype)
        valid = _meta(*rows, dtype=torch.bool) if masked else None
        mass = _meta(*rows, dtype=torch.float32) if masked else None
        triton_decode_attention(_meta(1, heads, dim, dtype=dtype), k, k, 0.1, valid=valid, log_mass=mass)

    return call


def _step(heads: int, kv_heads: int, dim: int, *, by_heads=False, **more):
    """A decode step of a layer: its token is written, and all of its statistics are kept."""

    def call():
        from d2o_dist.kernels.scored_decode.triton import triton_scored_decode
        from d2o_dist.kernels.segments import Segments

        rows, segments = (1, kv_heads, 6568), None
        if by_heads:
            rows = (kv_heads * 6568,)
            segments = Segments(*(_meta(1, kv_heads, dtype=torch.int64) for _ in range(2)), 6568, ())
        k, v, (scores, rates, mass) = _meta(*rows, dim), _meta(*rows, dim), _meta(3, *rows, dtype=torch.float32)
        newest, present = _meta(1, kv_heads, dtype=torch.int64), _meta(1, dtype=torch.bool)
        options = dict(softcap=None, sinks=None, peaks=False, rate_window=32, widths=None, total=None) | more
        triton_scored_decode(
            _meta(1, heads, dim), k, v, 0.1, valid=_meta(*rows, dtype=torch.bool), newest=newest, log_mass=mass,
            scores=scores, rates=rates, present=present, new=(_meta(1, kv_heads, dim), _meta(1, kv_heads, dim)),
            segments=segments, **options,
        )  # fmt: skip

    return call


def _nearest(kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16):
    def call():
        from d2o_dist.kernels.nearest_kept.triton import triton_nearest_kept

        evicted, kept = _meta(kv_heads, 26214, dim, dtype=dtype), _meta(kv_heads, 6554, dim, dtype=dtype)
        triton_nearest_kept(evicted, kept, _meta(kv_heads, 6554, dtype=torch.bool))

    return call


def _merge(kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16):
    def call():
        from d2o_dist.kernels.merge_into.triton import triton_merge_into

        kept, evicted = _meta(1, kv_heads, 6554, dim, dtype=dtype), _meta(1, kv_heads, 26214, dim, dtype=dtype)
        weight, own = (_meta(1, kv_heads, size, dtype=torch.float32) for size in (26214, 6554))
        target, merged = (_meta(1, kv_heads, 26214, dtype=kind) for kind in (torch.int64, torch.bool))
        triton_merge_into((kept, kept), (evicted, evicted), weight, target, merged, own, weight)

    return call


CASES = {}
for _name, _shape in MODELS.items():
    CASES[f"column_sums-{_name}"] = _column_sums(*_shape)
    CASES[f"column_peaks-{_name}"] = _column_peaks(*_shape)
    CASES[f"column_peaks-{_name}-turn"] = _column_peaks(*_shape, bias=True, causal=True)
    CASES[f"prefill-{_name}"] = _prefill(*_shape)
    CASES[f"prefill-{_name}-bias"] = _prefill(*_shape, bias=True)
    CASES[f"decode-{_name}"] = _decode(*_shape)
    CASES[f"step-{_name}"] = _step(*_shape)
    CASES[f"step-{_name}-heads"] = _step(*_shape, by_heads=True)
    CASES[f"nearest-{_name}"] = _nearest(*_shape[1:])
    CASES[f"merge-{_name}"] = _merge(*_shape[1:])
for _dim in (64, 80, 96, 256):
    CASES[f"column_sums-dim{_dim}"] = _column_sums(8, 2, _dim)
    CASES[f"column_peaks-dim{_dim}"] = _column_peaks(8, 2, _dim)
    CASES[f"prefill-dim{_dim}"] = _prefill(8, 2, _dim)
    CASES[f"decode-dim{_dim}"] = _decode(8, 2, _dim, masked=False)
    CASES[f"nearest-dim{_dim}"] = _nearest(2, _dim)
    CASES[f"merge-dim{_dim}"] = _merge(2, _dim)
for _op, _call in (("decode", _decode(32, 8, 128, torch.float32)), ("nearest", _nearest(8, 128, torch.float32))):
    CASES[f"{_op}-float32"] = _call
CASES["step-dim256"] = _step(8, 4, 256, softcap=50.0, sinks=_meta(1, 8, dtype=torch.float32))
CASES["decode-float32-dim256"] = _decode(8, 2, 256, torch.float32)
CASES["nearest-float32-dim256"] = _nearest(2, 256, torch.float32)
CASES["prefill-window"] = _prefill(32, 8, 128, window=4096)
CASES["prefill-float32"] = _prefill(32, 8, 128, torch.float32)
CASES["prefill-float32-dim256"] = _prefill(8, 2, 256, torch.float32)
CASES["column_peaks-float32"] = _column_peaks(32, 8, 128, torch.float32)
CASES["column_peaks-float32-dim256"] = _column_peaks(8, 2, 256, torch.float32)
CASES["column_sums-float32"] = _column_sums(32, 8, 128, torch.float32)
CASES["column_sums-float32-dim256"] = _column_sums(8, 2, 256, torch.float32)
CASES["column_sums-bias-window"] = _column_sums(32, 8, 128, with_bias=True, window=4096)
