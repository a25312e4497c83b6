"""A decode step of one layer: attention over its slots, and what the step adds to their scores and rates.

Shapes depend on the buffers alone, and nothing asks the device: the step can be recorded once and replayed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype
from d2o_dist.kernels.decode_attention import decode_attention, decode_with_logits
from d2o_dist.kernels.finish_decode import add_probabilities, pace_of, slot_probabilities
from d2o_dist.kernels.lse import with_sinks
from d2o_dist.kernels.registry import Op, Torch, Triton
from d2o_dist.kernels.scored_decode.cpu import bias_of, decode_rows
from d2o_dist.kernels.scored_decode.naive import naive_scored_decode
from d2o_dist.kernels.scored_decode.steps import RowSteps
from d2o_dist.kernels.segments import Segments
from d2o_dist.slots.append import write_tokens
from d2o_dist.slots.tables import Tables

__all__ = ["naive_scored_decode", "scored_decode", "scored_decode_of_heads", "scored_decode_steps"]


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
    new: tuple[Tensor, Tensor] | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """q [B, Hq, D]; k, v [B, Hkv, S, D], finite also where not valid -> output [B, Hq, D] in the dtype of q.

    Args:
        valid: [B, S] or [B, Hkv, S] bool, the live slots; newest: [B, Hkv] or [B, 1] int64, the slot of this step's
            token.
        log_mass: [B, Hkv, S], added to the logits, after softcap has bounded them.
        sinks: [1, Hq], the logit of one more key of each head, whose value is zero; None: none.
        scores, rates: [B, Hkv, S] in acc dtype, updated in place as `finish_decode` says; None: not kept.
        peaks: scores become the larger of themselves and the probabilities, instead of their sum.
        present: [B] bool; rows that take no step get output 0, and their scores and rates stay. None: all take it.
        widths: per row, how many slots are looked at, the first ones; no other is valid. None: S. On a CPU the row then
            gets what it gets alone, to the last bit.
        new: the key [B, Hkv, D] and the value of this step's token, which are written into its slot first; a slot of a
            row that takes no step is free. None: they are there.
        total: what becomes of the probabilities [B, Hkv, S] before they are added: the sum over ranks that hold copies
            of the KV heads. None: they are complete.
    """
    path = _OP.pick(q, k, v, total=total is not None)
    return path(
        q, k, v, scale, valid=valid, newest=newest, log_mass=log_mass, softcap=softcap, sinks=sinks, scores=scores,
        peaks=peaks, rates=rates, rate_window=rate_window, present=present, widths=widths, new=new, total=total,
    )  # fmt: skip


def scored_decode_steps(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, tables: Tables | None, **options: Any
) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]:
    """For steps over the same buffers: a function of the q and the `new` of each, that does as `scored_decode` does.

    Args:
        q: one like those that come; k, v, options: all but `new`, as of `scored_decode`; what they hold may change, but
            no tensor may become another one.
        tables: what some of the options amount to in each step, of buffers without gaps between slots; None: it is not
            known.
    """
    path = _OP.pick(q, k, v, total=options["total"] is not None)
    if path is by_probabilities and tables is not None and options["widths"] is not None:
        names = ("softcap", "sinks", "scores", "peaks", "rates", "present", "widths", "total")
        return RowSteps(k, v, scale, tables=tables, **{name: options[name] for name in names})
    return lambda q, new: path(q, k, v, scale, new=new, **options)


def scored_decode_of_heads(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments, *, widths: Sequence[Sequence[int]],
    sinks: Tensor | None = None, **options,
) -> Tensor:  # fmt: skip
    """As `scored_decode`, over KV heads that hold different numbers of slots.

    Args:
        k, v [N, D], valid, log_mass, scores, rates [N]: of all slots; widths: of each KV head, per row.
    """
    path = _HEADS.pick(q, k, v, total=options.get("total") is not None)
    return path(q, k, v, scale, segments=segments, widths=widths, sinks=sinks, **options)


def by_probabilities(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, valid: Tensor, newest: Tensor, log_mass: Tensor | None,
    softcap: float | None, sinks: Tensor | None, scores: Tensor | None, peaks: bool, rates: Tensor | None,
    rate_window: int, present: Tensor | None, widths: Sequence[int] | None, new: tuple[Tensor, Tensor] | None,
    total: Callable[[Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    """PyTorch's operators have the probabilities at hand, and would have to compute them again from the logits."""
    if new is not None:
        write_tokens(newest, (k, new[0]), (v, new[1]))
    attend = dict(q=q, k=k, v=v, scale=scale, softcap=softcap)
    if widths is not None and q.device.type == "cpu":
        bias = bias_of(valid, log_mass, k.shape[:3], acc_dtype(q.dtype))
        sees = new is not None and present is None
        out, probs = decode_rows(**attend, bias=bias, sinks=sinks, widths=widths, sees=sees)
    elif sinks is None:
        out, _, probs = decode_attention(**attend, valid=valid, log_mass=log_mass, finite=True)
    else:
        out, lse, logits = decode_with_logits(**attend, valid=valid, log_mass=log_mass)
        out, lse = with_sinks(out, lse, sinks)
        probs = slot_probabilities(logits, lse, k.shape[1])
    if scores is not None or rates is not None:
        probs = probs if total is None else total(probs)
        pace = None if rates is None else pace_of(rates, newest, rate_window, present)
        add_probabilities(probs, scores, rates, pace, present=present, peaks=peaks)
    return out if present is None else out * present[:, None, None]


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, segments: Segments, newest: Tensor,
    widths: Sequence[Sequence[int]], sinks: Tensor | None = None, new: tuple[Tensor, Tensor] | None = None, **options,
) -> Tensor:  # fmt: skip
    """One KV head after the other."""
    count, outs = len(widths), []
    queries, sink = q.chunk(count, 1), [None] * count if sinks is None else sinks.chunk(count, 1)
    of_slots = {name: options.pop(name, None) for name in ("valid", "log_mass", "scores", "rates")}
    for number in range(count):
        here, (keys, values) = slice(number, number + 1), (segments.of_head(number, x) for x in (k, v))
        own = {name: None if x is None else segments.of_head(number, x) for name, x in of_slots.items()}
        outs.append(scored_decode(
            queries[number], keys, values, scale, newest=newest[:, here], widths=widths[number], sinks=sink[number],
            new=None if new is None else tuple(x[:, here] for x in new), **own, **options,
        ))  # fmt: skip
    return torch.cat(outs, 1)


_OP = Op("scored_decode", Triton("scored_decode.triton:triton_scored_decode", without={"total"}),
         Torch(by_probabilities))  # fmt: skip
_HEADS = Op("scored_decode_of_heads", Triton("scored_decode.triton:triton_scored_decode", without={"total"}),
            Torch(one_by_one))  # fmt: skip
