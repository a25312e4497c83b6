"""What every op needs: the accumulation dtype, and shape checks whose errors name both numbers."""

import torch
from torch import Tensor

from d2o_dist.slots.slots import stats_dtype

LOG2_E = 1.4426950408889634  # exp(x) == exp2(x * LOG2_E)
LN_2 = 0.6931471805599453


# Logits, lse, sums and probabilities are accumulated in the dtype that statistics are kept in.
acc_dtype = stats_dtype


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap); None: the logits themselves."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def capped_product(queries: Tensor, keys: Tensor, head_dim: int, softcap: float, out: Tensor | None = None) -> Tensor:
    """Logits in units of log2, of vectors whose columns from `head_dim` on hold what is added after the cap.

    queries [..., n, X], the first columns scaled by scale / softcap, the others by log2(e); keys [..., S, X].
    """
    logits = torch.matmul(queries[..., :head_dim], keys[..., :head_dim].mT, out=out)
    logits.tanh_().mul_(softcap * LOG2_E)
    return logits.add_(queries[..., head_dim:] @ keys[..., head_dim:].mT)


def bits_of(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """All bits where `keep`, none elsewhere, in integers as wide as dtype, for `zero_hidden_`."""
    return keep.to({4: torch.int32, 8: torch.int64}[dtype.itemsize]).neg_()


def zero_hidden_(x: Tensor, bits: Tensor) -> Tensor:
    """x, with 0 where bits, which may be broadcast, has none, whatever was there: NaN and inf too.

    On a CPU a twentieth of the time of `masked_fill_` by a mask that is broadcast, which takes an element at a time.
    """
    x.view(bits.dtype).bitwise_and_(bits)
    return x


def wants_grad(*tensors: Tensor) -> bool:
    """Whether autograd would have to see this call."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def group_size(num_heads: int, num_kv_heads: int) -> int:
    """G, the query heads that share one KV head."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads ({num_heads}) must be a positive multiple of num_kv_heads ({num_kv_heads})")
    return num_heads // num_kv_heads


def check_queries_keys(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """q [B, Hq, Tq, D] against k (and v) [B, Hkv, Tk, D]: ranks, batch, head dim, dtype and grouping."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must have 4 dims, got {q.dim()} and {k.dim()}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"batch of q ({q.shape[0]}) must equal batch of k ({k.shape[0]})")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"head dim of q ({q.shape[3]}) must equal head dim of k ({k.shape[3]})")
    if q.dtype != k.dtype:
        raise ValueError(f"dtype of q ({q.dtype}) must equal dtype of k ({k.dtype})")
    if v is not None and (v.shape[:-1] != k.shape[:-1] or v.dtype != k.dtype):
        raise ValueError(f"v {tuple(v.shape)} {v.dtype} must match k {tuple(k.shape)} {k.dtype} but for its last dim")
    group_size(q.shape[1], k.shape[1])


def check_lse(q: Tensor, lse: Tensor) -> None:
    """lse [B, Hq, Tq] against q [B, Hq, Tq, D]."""
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse {tuple(lse.shape)} must have the shape of q without its last dim {tuple(q.shape[:3])}")


def check_bias(k: Tensor, bias: Tensor | None) -> None:
    """bias [B, Hkv, Tk] against k [B, Hkv, Tk, D]."""
    if bias is not None and bias.shape != k.shape[:3]:
        raise ValueError(f"bias {tuple(bias.shape)} must have the shape of k without its last dim {tuple(k.shape[:3])}")
