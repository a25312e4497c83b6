"""The oracle: dense attention and its column sums, one after the other."""

from torch import Tensor

from d2o_dist.kernels.column_sums import naive_column_sums
from d2o_dist.kernels.prefill_attention import naive_prefill_attention


def naive_scored_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int = 0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `scored_prefill_attention`."""
    out, lse = naive_prefill_attention(q, k, v, scale, q_start=q_start, softcap=softcap)
    return out, lse, naive_column_sums(q, k, lse, scale, q_start=q_start, softcap=softcap)
