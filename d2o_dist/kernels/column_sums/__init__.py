"""Column sums of the attention matrix, from the lse, without ever holding the matrix."""

from torch import Tensor

from d2o_dist.kernels.column_sums.naive import naive_column_sums
from d2o_dist.kernels.column_sums.torch_banded import BAND, banded_column_sums
from d2o_dist.kernels.column_sums.torch_blocked import blocked_column_sums
from d2o_dist.kernels.common import check_bias, check_lse, check_queries_keys
from d2o_dist.kernels.registry import Op, Torch, Triton

__all__ = ["column_sums", "naive_column_sums"]

_OP = Op("column_sums", Triton("column_sums.triton:triton_column_sums", without={"softcap"}),
         Torch(banded_column_sums, devices=("cpu",), needs={"narrow"}, without={"bias", "softcap"}),
         Torch(blocked_column_sums))  # fmt: skip


def column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    *,
    q_start: int = 0,
    k_start: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
    num_last: int | None = None,
    query_stride: int = 1,
    stride_start: int | None = None,
) -> Tensor:
    """c[h, j] = sum over queries i that see key j of exp(scale * q_i . k_j + bias_j - lse_i): [B, Hq, Tk], acc dtype.

    q [B, Hq, Tq, D]; k [B, Hkv, Tk, D]; lse [B, Hq, Tq] natural log, of the whole attention (keys of other shards and
    `bias` included). Query i has index q_start + i, key j has k_start + j; either may be below 0. bias [B, Hkv, Tk] is
    added to the logits of a key (log_mass), after softcap has bounded the scaled products. causal: key index <= query
    index. window (needs causal): also key index > query index - window, and must be the window of the lse. num_last:
    only the last so many queries (all if there are fewer). query_stride: only queries i for which stride_start + i is
    one less than a multiple of it, so that chunks and shards of a prompt choose as the whole does; their plain sum, not
    scaled up. stride_start: q_start if not given. At most one of num_last and query_stride.

    Rows whose lse is infinite (no key, or padding) and keys whose bias is -inf contribute 0, whatever their q or k
    hold. Not differentiable: scores are statistics. Working memory is bounded (about 32 MiB on a CPU), whatever T.
    """
    check_queries_keys(q, k)
    check_lse(q, lse)
    check_bias(k, bias)
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window ({window}) must be at least 1 and needs causal=True (causal={causal})")
    if num_last is not None:
        if num_last < 0:
            raise ValueError(f"num_last ({num_last}) must be at least 0")
        skipped = max(0, q.shape[2] - num_last)
        q, lse, q_start = q[:, :, skipped:], lse[:, :, skipped:], q_start + skipped
    if query_stride != 1:
        if query_stride < 1 or num_last is not None:
            raise ValueError(f"query_stride ({query_stride}) must be at least 1 and excludes num_last ({num_last})")
        first = (-1 - (q_start if stride_start is None else stride_start)) % query_stride
        q, lse, q_start = q[:, :, first::query_stride], lse[:, :, first::query_stride], q_start + first
    narrow = window is not None and window <= BAND and query_stride == 1
    return _OP.pick(q, k, softcap=softcap is not None, bias=bias is not None, narrow=narrow)(
        q, k, lse, scale,
        q_start=q_start, k_start=k_start, q_step=query_stride, bias=bias, softcap=softcap, causal=causal, window=window,
    )  # fmt: skip
