"""The end of a decode step of a layer: parts of its attention become one, and scores and rates follow. K is not read
again.

The parts are of slots that were attended apart: on several ranks, or by several programs of a GPU. With sequence shards
each rank then updates its own slots by the lse of all of them, and nothing more is exchanged.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from d2o_dist.kernels.common import group_size
from d2o_dist.kernels.finish_decode.naive import naive_finish_decode
from d2o_dist.kernels.finish_decode.torch_ops import (
    add_probabilities,
    pace_of,
    torch_finish_decode,
    torch_slot_probabilities,
)
from d2o_dist.kernels.registry import Op, Torch, Triton

__all__ = ["add_probabilities", "finish_decode", "naive_finish_decode", "pace_of", "slot_probabilities"]

_PROBABILITIES = Op("slot_probabilities", Triton("finish_decode.triton:triton_slot_probabilities", head_dims=None),
                    Torch(torch_slot_probabilities))  # fmt: skip
_FINISH = Op("finish_decode", Triton("finish_decode.triton:triton_finish_decode", without={"total"}),
             Torch(torch_finish_decode))  # fmt: skip


def slot_probabilities(logits: Tensor, lse: Tensor, num_kv_heads: int) -> Tensor:
    """exp(logits - lse), summed over the query heads of a group: [B, Hq, S] and [B, Hq] -> [B, Hkv, S] in acc dtype.

    Slots whose logit is -inf, and heads whose lse is -inf, give 0.
    """
    if lse.shape != logits.shape[:2]:
        raise ValueError(f"lse {tuple(lse.shape)} must have the shape of logits {tuple(logits.shape)} without slots")
    group_size(logits.shape[1], num_kv_heads)
    return _PROBABILITIES.pick(logits, lse)(logits, lse, num_kv_heads)


def finish_decode(
    outs: Tensor,
    lses: Tensor,
    logits: Tensor,
    dtype: torch.dtype,
    *,
    num_kv_heads: int,
    sinks: Tensor | None = None,
    scores: Tensor | None = None,
    rates: Tensor | None = None,
    peaks: bool = False,
    newest: Tensor | None = None,
    rate_window: int = 32,
    present: Tensor | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """outs [P, B, Hq, D] and lses [P, B, Hq] of P parts, logits [B, Hq, S] of the slots here -> output [B, Hq, D].

    With p [B, Hkv, S] = `slot_probabilities` by the lse of all parts and the sink, in place: scores += p; rates <-
    (1 - 1/rate_window) rates + p / rate_window, and p itself at the newest slot.

    Args:
        outs, lses: acc dtype, lse -inf where a part had no key; logits: acc dtype, natural units, log_mass included,
            -inf on slots that are not live; read only where scores or rates are kept.
        dtype: of the output.
        sinks: [1, Hq], the logit of one more key of each head, whose value is zero; None: none.
        scores, rates: [B, Hkv, S] in acc dtype, any strides; None: not kept.
        peaks: scores become the larger of themselves and p, instead of their sum.
        newest: [B, Hkv] or [B, 1] int64, the slot of the token of this step, -1 where it is elsewhere; needed by rates.
        present: [B] bool; rows that took no step get output 0 and change nothing. None: all took it.
        total: what becomes of p before it is added: the sum over ranks that hold copies of the KV heads. None: it is
            complete.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, num_slots = lses.shape[1:], logits.shape[2]
    if outs.shape[:3] != lses.shape or logits.shape[:2] != rows:
        raise ValueError(
            f"outs {tuple(outs.shape)}, lses {tuple(lses.shape)} and logits {tuple(logits.shape)} must be "
            "[P, B, Hq, D], [P, B, Hq] and [B, Hq, S]"
        )
    group_size(rows[1], num_kv_heads)
    for name, x in (("scores", scores), ("rates", rates)):
        if x is not None and x.shape != (rows[0], num_kv_heads, num_slots):
            raise ValueError(f"{name} {tuple(x.shape)} must be [B, Hkv, S] of logits {tuple(logits.shape)}")
    if rates is not None and (newest is None or newest.shape not in ((rows[0], num_kv_heads), (rows[0], 1))):
        shape = None if newest is None else tuple(newest.shape)
        raise ValueError(f"rates need newest, one slot for each of {rows[0]} rows and KV heads, not {shape}")
    options = dict(scores=scores, rates=rates, peaks=peaks, newest=newest, rate_window=rate_window, present=present)
    path = _FINISH.pick(outs, lses, total=total is not None)
    return path(outs, lses, logits, dtype, num_kv_heads=num_kv_heads, sinks=sinks, total=total, **options)
