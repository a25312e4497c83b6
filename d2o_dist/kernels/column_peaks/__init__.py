"""Column peaks: the most attention a key gets from any one query, without ever holding the matrix."""

from torch import Tensor

from d2o_dist.kernels.column_peaks.naive import naive_column_peaks
from d2o_dist.kernels.column_peaks.torch_blocked import blocked_column_peaks
from d2o_dist.kernels.common import check_bias, check_lse, check_queries_keys
from d2o_dist.kernels.registry import Op, Torch, Triton

__all__ = ["column_peaks", "naive_column_peaks"]

_OP = Op("column_peaks", Triton("column_peaks.triton:triton_column_peaks", without={"softcap"}),
         Torch(blocked_column_peaks))  # fmt: skip


def column_peaks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    *,
    q_start: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """p[g, j] = max over queries i that see key j of sum over heads h of group g of exp(scale * q_i . k_j + bias_j -
    lse_i): [B, Hkv, Tk], acc dtype, 0 for a key that no query sees.

    q [B, Hq, Tq, D]; k [B, Hkv, Tk, D]; lse [B, Hq, Tq] natural log, of the whole attention (`bias` and keys that are
    not given here included). Query i has index q_start + i; causal: it sees keys of index <= its own. bias
    [B, Hkv, Tk] is added to the logits of a key, after softcap has bounded the scaled products.

    Rows whose lse is infinite and keys whose bias is -inf contribute 0, whatever their q or k hold. Not
    differentiable. Working memory is bounded by a block of logits.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_queries_keys(q, k)
    check_lse(q, lse)
    check_bias(k, bias)
    path = _OP.pick(q, k, softcap=softcap is not None)
    return path(q, k, lse, scale, q_start=q_start, bias=bias, softcap=softcap, causal=causal)
