"""Decode attention over slots that are spread over sequence ranks: one packed collective a layer.

Shape legend: B rows, Hq query heads, Hkv KV heads, G = Hq / Hkv, C slots of this rank, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.comm.collectives import Collectives
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.decode_attention import decode_with_logits
from d2o_dist.kernels.lse import merge_partials, with_sinks
from d2o_dist.kernels.update_scores import slot_probabilities


def sharded_decode_attention(
    sp: Collectives, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, valid: Tensor, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over the slots of all ranks.

    Args:
        q: [B, Hq, D], the same on all ranks; k, v: [B, Hkv, C, D] of this rank; valid: [B, Hkv, C] bool.
        log_mass: [B, Hkv, C], added to the logits, or None.

    Returns:
        output [B, Hq, D] in the dtype of q, the same bits on all ranks, and the probabilities of this rank's slots,
        [B, Hkv, C] in the statistics' dtype, summed over the group: over all ranks they add up to G.
    """
    out, lse, logits = decode_with_logits(q, k, v, **softmax.logits, valid=valid, log_mass=log_mass)
    packed = sp.all_gather(torch.cat([out.to(lse.dtype), lse.unsqueeze(-1)], -1).unsqueeze(0), 0)
    merged, total = merge_partials(packed[..., :-1].unbind(0), packed[..., -1].unbind(0))
    merged, total = with_sinks(merged, total, softmax.sinks)
    # With the lse of all ranks each knows what its own slots got: no second exchange.
    return merged.to(q.dtype), slot_probabilities(logits, total, k.shape[1])
