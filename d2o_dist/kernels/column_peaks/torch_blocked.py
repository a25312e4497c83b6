"""Column peaks by blocked matmuls: torch ops only, any device.

As for column sums, lse and bias ride in the matmul as extra columns, so that a block comes out ready for exp2; the G
query heads of a KV head lie side by side in it, are added up, and the maximum is taken over its queries.
"""

import torch
from torch import Tensor

from d2o_dist.kernels.common import LOG2_E, acc_dtype, capped_product, group_size

# Queries of a block, and logits of a block on a CPU (1 MiB in float32, within the caches) and elsewhere.
_QUERIES = 256
_CPU_LOGITS, _OTHER_LOGITS = 1 << 18, 1 << 23


@torch.no_grad()
def blocked_column_peaks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    *,
    q_start: int,
    bias: Tensor | None,
    softcap: float | None = None,
    causal: bool,
    num_queries: int = _QUERIES,
    num_logits: int | None = None,
) -> Tensor:
    """As `column_peaks`: q [B, Hq, Tq, D], k [B, Hkv, Tk, D], lse [B, Hq, Tq], bias [B, Hkv, Tk] -> [B, Hkv, Tk].

    Args:
        num_queries, num_logits: of a block.
    """
    group, acc = group_size(q.shape[1], k.shape[1]), acc_dtype(q.dtype)
    batch, num_kv_heads, num_keys, dim = k.shape
    peaks = torch.zeros(batch, num_kv_heads, num_keys, dtype=acc, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return peaks
    if num_logits is None:
        num_logits = _CPU_LOGITS if q.device.type == "cpu" else _OTHER_LOGITS
    keys = _extended_keys(k, bias, acc)
    factor = scale * LOG2_E if softcap is None else scale / softcap
    grouped, dead = q.unflatten(1, (num_kv_heads, group)), ~torch.isfinite(lse.unflatten(1, (num_kv_heads, group)))
    for i0 in range(0, q.shape[2], num_queries):
        i1 = min(i0 + num_queries, q.shape[2])
        queries = q.new_empty(batch, num_kv_heads, group, i1 - i0, keys.shape[-1], dtype=acc)
        here = dead[..., i0:i1]
        queries[..., :dim] = (grouped[..., i0:i1, :].to(acc) * factor).masked_fill(here.unsqueeze(-1), 0)
        rows = lse.unflatten(1, (num_kv_heads, group))[..., i0:i1].to(acc)
        queries[..., dim] = (rows * -LOG2_E).masked_fill(here, -torch.inf)
        queries[..., dim + 1 :] = 1
        end = min(num_keys, q_start + i1) if causal else num_keys
        width = max(1, num_logits // (batch * num_kv_heads * group * (i1 - i0)))
        for j0 in range(0, end, width):
            j1 = min(j0 + width, end)
            some = keys[:, :, None, j0:j1]
            logits = queries @ some.mT if softcap is None else capped_product(queries, some, dim, softcap)
            received = logits.exp2_().sum(2)
            if causal and j1 - 1 > q_start + i0:
                received.tril_(q_start + i0 - j0)
            torch.maximum(peaks[..., j0:j1], received.amax(2), out=peaks[..., j0:j1])
    return peaks


def _extended_keys(k: Tensor, bias: Tensor | None, acc: torch.dtype) -> Tensor:
    """[k, 1] or [k, 1, bias * log2(e)] in acc dtype; a key whose bias is -inf is zeroed, so that it gets exactly 0."""
    ones = k.new_ones(*k.shape[:3], 1, dtype=acc)
    if bias is None:
        return torch.cat([k.to(acc), ones], -1)
    keys = k.to(acc).masked_fill((bias == -torch.inf).unsqueeze(-1), 0)
    return torch.cat([keys, ones, bias.to(acc).unsqueeze(-1) * LOG2_E], -1)
