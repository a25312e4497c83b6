"""What a decode step adds to scores and rates, from the logits it kept and the final lse. K is not read again.

With sequence shards the lse is that of all shards: each then updates its own slots, and nothing more is exchanged.
"""

from torch import Tensor

from d2o_dist.kernels.common import group_size
from d2o_dist.kernels.registry import Op, Torch, Triton
from d2o_dist.kernels.update_scores.naive import naive_update_scores
from d2o_dist.kernels.update_scores.torch_ops import add_probabilities, torch_slot_probabilities, torch_update_scores

__all__ = ["add_probabilities", "naive_update_scores", "slot_probabilities", "update_scores"]

# The last dim is slots: no head dim limits the kernel.
_PROBABILITIES = Op("slot_probabilities", Triton("update_scores.triton:triton_slot_probabilities", head_dims=None),
                    Torch(torch_slot_probabilities))  # fmt: skip
_UPDATE = Op("update_scores", Triton("update_scores.triton:triton_update_scores", head_dims=None),
             Torch(torch_update_scores))  # fmt: skip


def slot_probabilities(logits: Tensor, lse: Tensor, num_kv_heads: int) -> Tensor:
    """exp(logits - lse), summed over the query heads of a group: [B, Hq, S] and [B, Hq] -> [B, Hkv, S] in acc dtype.

    Slots whose logit is -inf, and heads whose lse is -inf, give 0.
    """
    _check(logits, lse, num_kv_heads)
    return _PROBABILITIES.pick(logits, lse)(logits, lse, num_kv_heads)


def update_scores(
    logits: Tensor,
    lse: Tensor,
    scores: Tensor | None = None,
    rates: Tensor | None = None,
    *,
    newest: Tensor | None = None,
    rate_window: int = 32,
    present: Tensor | None = None,
) -> None:
    """In place: scores += p; rates <- (1 - 1/rate_window) rates + p / rate_window, and p itself at the newest slot.

    Args:
        logits: [B, Hq, S] of this step, natural units, log_mass included, -inf on slots that are not live.
        lse: [B, Hq], over all slots of all shards. p [B, Hkv, S] is `slot_probabilities(logits, lse)`.
        scores, rates: [B, Hkv, S] float32 (float64 for float64 logits), any strides, or None; not both None.
        newest: [B, Hkv] or [B, 1] int64, the slot of the token of this step, outside [0, S) where it is elsewhere;
            needed by rates.
        present: [B] bool; rows that took no step change nothing.

    Raises:
        ValueError: shapes that do not fit, or nothing to update.
    """
    if scores is None and rates is None:
        raise ValueError("update_scores needs scores, rates or both")
    for name, x in (("scores", scores), ("rates", rates)):
        if x is not None and (x.shape[0], x.shape[2]) != (logits.shape[0], logits.shape[2]):
            raise ValueError(f"{name} {tuple(x.shape)} must be [B, Hkv, S] of logits {tuple(logits.shape)}")
    num_kv_heads = (scores if scores is not None else rates).shape[1]
    _check(logits, lse, num_kv_heads)
    if rates is not None and (newest is None or newest.shape not in ((len(logits), num_kv_heads), (len(logits), 1))):
        shape = None if newest is None else tuple(newest.shape)
        raise ValueError(f"rates need newest, one slot for each of {len(logits)} rows and KV heads, not {shape}")
    _UPDATE.pick(logits, lse)(
        logits, lse, num_kv_heads, scores=scores, rates=rates, newest=newest, rate_window=rate_window, present=present
    )


def _check(logits: Tensor, lse: Tensor, num_kv_heads: int) -> None:
    if lse.shape != logits.shape[:2]:
        raise ValueError(f"lse {tuple(lse.shape)} must have the shape of logits {tuple(logits.shape)} without slots")
    group_size(logits.shape[1], num_kv_heads)
