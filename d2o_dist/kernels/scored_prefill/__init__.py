"""Causal attention of a chunk together with the column sums of its attention matrix."""

from torch import Tensor

from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.common import check_queries_keys
from d2o_dist.kernels.prefill_attention import prefill_attention
from d2o_dist.kernels.registry import Op, Torch
from d2o_dist.kernels.scored_prefill.cpu import cpu_scored_prefill
from d2o_dist.kernels.scored_prefill.naive import naive_scored_prefill_attention

__all__ = ["naive_scored_prefill_attention", "scored_prefill_attention"]


def scored_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int = 0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, Hq, Tq, D] in the dtype of q, lse [B, Hq, Tq] and column sums [B, Hq, Tk] in acc dtype.

    q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D] with Tk = q_start + Tq; query i sees keys j <= q_start + i; softcap bounds
    the scaled products. On a CPU one fused pass, but with a softcap; elsewhere `prefill_attention`, then `column_sums`.
    Working memory is bounded by a block of 128 rows a thread (or 16 MiB) of Tk logits. Not differentiable.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_queries_keys(q, k, v)
    if k.shape[2] != q_start + q.shape[2]:
        raise ValueError(f"k has {k.shape[2]} keys, but q_start ({q_start}) + Tq ({q.shape[2]}) is another number")
    return _OP.pick(q, softcap=softcap is not None)(q, k, v, scale, q_start=q_start, softcap=softcap)


def two_passes(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = prefill_attention(q, k, v, scale, q_start=q_start, softcap=softcap)
    return out, lse, column_sums(q, k, lse, scale, q_start=q_start, softcap=softcap)


_OP = Op("scored_prefill", Torch(cpu_scored_prefill, devices=("cpu",), empty=False, without={"softcap"}),
         Torch(two_passes))  # fmt: skip
