"""A decode step of one layer: attention over its slots, and what the step adds to their scores and rates.

Shapes depend on the buffers alone, and nothing asks the device: the step can be recorded once and replayed.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from d2o_dist.kernels.decode_attention import decode_attention, decode_with_logits
from d2o_dist.kernels.lse import with_sinks
from d2o_dist.kernels.registry import Op, Torch, Triton
from d2o_dist.kernels.scored_decode.cpu import decode_rows
from d2o_dist.kernels.scored_decode.naive import naive_scored_decode
from d2o_dist.kernels.update_scores import add_probabilities, slot_probabilities, update_scores

__all__ = ["naive_scored_decode", "scored_decode"]


def scored_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor,
    newest: Tensor,
    log_mass: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scores: Tensor | None = None,
    peaks: bool = False,
    rates: Tensor | None = None,
    rate_window: int = 32,
    present: Tensor | None = None,
    widths: Sequence[int] | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """q [B, Hq, D]; k, v [B, Hkv, S, D], finite also where not valid -> output [B, Hq, D] in the dtype of q.

    Args:
        valid: [B, S] or [B, Hkv, S] bool, the live slots; newest: [B, Hkv] or [B, 1] int64, the slot of this step's
            token.
        log_mass: [B, Hkv, S], added to the logits, after softcap has bounded them.
        sinks: [1, Hq], the logit of one more key of each head, whose value is zero; None: none.
        scores, rates: [B, Hkv, S] in acc dtype, updated in place as `update_scores` says; None: not kept.
        peaks: scores become the larger of themselves and the probabilities, instead of their sum.
        present: [B] bool; rows that take no step get output 0, and their scores and rates stay. None: all take it.
        widths: per row, how many slots are looked at, the first ones; no other is valid. None: S. On a CPU the row then
            gets what it gets alone, to the last bit.
        total: what becomes of the probabilities [B, Hkv, S] before they are added: the sum over ranks that hold copies
            of the KV heads. None: they are complete.
    """
    attend = dict(q=q, k=k, v=v, scale=scale, valid=valid, log_mass=log_mass, softcap=softcap)
    rows = widths if q.device.type == "cpu" else None
    update = dict(scores=scores, rates=rates, newest=newest, rate_window=rate_window, present=present)
    unscored = scores is None and rates is None
    path = _OP.pick(q, k, v, unscored=unscored, peaks=peaks, total=total is not None)
    out = path(attend, sinks, update, peaks=peaks, total=total, widths=rows)
    return out if present is None else out * present[:, None, None]


def by_logits(
    attend: dict, sinks: Tensor | None, update: dict, *, peaks: bool, total: None, widths: None
) -> Tensor:
    """Two kernels, for K is not read again; none of `update_scores` takes maxima."""
    out, lse, logits = decode_with_logits(**attend)
    out, lse = with_sinks(out, lse, sinks)
    update_scores(logits, lse, **update)
    return out


def by_probabilities(
    attend: dict, sinks: Tensor | None, update: dict, *, peaks: bool, total: Callable[[Tensor], Tensor] | None,
    widths: Sequence[int] | None,
) -> Tensor:  # fmt: skip
    """PyTorch's operators have the probabilities at hand, and would have to compute them again from the logits."""
    if widths is not None:
        out, probs = decode_rows(**attend, sinks=sinks, widths=widths)
    elif sinks is None:
        out, _, probs = decode_attention(**attend, finite=True)
    else:
        out, lse, logits = decode_with_logits(**attend)
        out, lse = with_sinks(out, lse, sinks)
        probs = slot_probabilities(logits, lse, attend["k"].shape[1])
    if update["scores"] is not None or update["rates"] is not None:
        add_probabilities(probs if total is None else total(probs), peaks=peaks, **update)
    return out


_OP = Op("scored_decode", Triton(by_logits, without={"unscored", "peaks", "total"}, empty=True),
         Torch(by_probabilities))  # fmt: skip
