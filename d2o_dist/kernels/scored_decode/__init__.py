"""A decode step of one layer: attention over its slots, and what the step adds to their scores and rates.

Shapes depend on the buffers alone, and nothing asks the device: the step can be recorded once and replayed.
"""

from collections.abc import Callable

from torch import Tensor

from d2o_dist.kernels.backend import takes_triton
from d2o_dist.kernels.decode_attention import decode_attention, decode_with_logits
from d2o_dist.kernels.scored_decode.naive import naive_scored_decode
from d2o_dist.kernels.update_scores import add_probabilities, update_scores

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
    scores: Tensor | None = None,
    peaks: bool = False,
    rates: Tensor | None = None,
    rate_window: int = 32,
    present: Tensor | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """q [B, Hq, D]; k, v [B, Hkv, S, D], finite also where not valid -> output [B, Hq, D] in the dtype of q.

    Args:
        valid: [B, S] or [B, Hkv, S] bool, the live slots; newest: [B, Hkv] or [B, 1] int64, the slot of this step's
            token.
        log_mass: [B, Hkv, S], added to the logits.
        scores, rates: [B, Hkv, S] in acc dtype, updated in place as `update_scores` says; None: not kept.
        peaks: scores become the larger of themselves and the probabilities, instead of their sum.
        present: [B] bool; rows that take no step get output 0, and their scores and rates stay. None: all take it.
        total: what becomes of the probabilities [B, Hkv, S] before they are added: the sum over ranks that hold copies
            of the KV heads. None: they are complete.
    """
    scored = scores is not None or rates is not None
    update = dict(newest=newest, rate_window=rate_window, present=present)
    if scored and total is None and not peaks and takes_triton(q, k, v, head_dim=q.shape[-1]):
        out, lse, logits = decode_with_logits(q, k, v, scale, valid=valid, log_mass=log_mass)
        update_scores(logits, lse, scores, rates, **update)
    else:
        # PyTorch's operators have the probabilities at hand, and would have to compute them again from the logits; no
        # kernel of `update_scores` takes maxima.
        out, _, probs = decode_attention(q, k, v, scale, valid=valid, log_mass=log_mass, finite=True)
        if scored:
            add_probabilities(probs if total is None else total(probs), scores, rates, peaks=peaks, **update)
    return out if present is None else out * present[:, None, None]
