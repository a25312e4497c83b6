"""Decode attention over slots that are spread over sequence ranks: one packed collective a layer.

Shape legend: B rows, Hq query heads, Hkv KV heads, G = Hq / Hkv, C slots of this rank, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2o_dist.comm.collectives import Collectives
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.decode_attention import decode_with_logits
from d2o_dist.kernels.finish_decode import finish_decode


def sharded_decode_attention(
    sp: Collectives, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, valid: Tensor, log_mass: Tensor | None,
    newest: Tensor, new: tuple[Tensor, Tensor] | None = None, **kept: Any,
) -> Tensor:  # fmt: skip
    """Attention of one query a row over the slots of all ranks.

    Args:
        q: [B, Hq, D], the same on all ranks; k, v: [B, Hkv, C, D] of this rank; valid: [B, Hkv, C] bool.
        log_mass: [B, Hkv, C], added to the logits, or None.
        newest: [B, Hkv] or [B, 1] int64, the slot of this step's token, -1 where another rank has it; new: its key
            [B, Hkv, D] and value, which are written there first. None: they are there.
        kept: what is kept of this rank's slots, as `finish_decode` takes it.

    Returns:
        output [B, Hq, D] in the dtype of q, the same bits on all ranks.
    """
    out, lse, logits = decode_with_logits(
        q, k, v, **softmax.logits, valid=valid, log_mass=log_mass, slot=newest, new=new
    )
    packed = sp.all_gather(torch.cat([out.to(lse.dtype), lse.unsqueeze(-1)], -1).unsqueeze(0), 0)
    # With the lse of all ranks each knows what its own slots got: no second exchange.
    return finish_decode(
        packed[..., :-1], packed[..., -1], logits, q.dtype, num_kv_heads=k.shape[1], sinks=softmax.sinks, newest=newest,
        **kept,
    )  # fmt: skip
