"""Teacher-forced continuations: the log-probabilities that a compressed cache gives, and how far they are from others.

Shape legend: B rows, n tokens of the continuation, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.comm.request import RequestRanks
from d2o_dist.engine.sampling import is_lost
from d2o_dist.eval.reading import MethodSession, TokenRows
from d2o_dist.evict.budgets import NOT_FINITE_BECAUSE
from d2o_dist.slots.slots import stats_dtype

# Positions whose distributions are compared at once: each takes V numbers, several times over.
_BLOCK = 64


@torch.inference_mode()
def continuation_logits(session: MethodSession, rows: TokenRows, how: str) -> Tensor:
    """Compress, then predict each token of `rows` (of one length n) from those before it: logits [B, n, V].

    Args:
        session: fresh; how: `chunk` (one forward over the compressed cache as it stands) or `decode` (token by token,
            with the evictions of decoding).
    """
    count = len(rows[0])
    assert all(len(row) == count for row in rows), "rows of one batch have continuations of one length"
    nothing = torch.zeros(0)
    first = session.prefill(nothing, nothing)[:, None]
    if count == 1:
        return first
    if how == "decode":
        steps = [session.decode([row[place] for row in rows])[:, None] for place in range(count - 1)]
        return torch.cat([first, *steps], 1)
    return torch.cat([first, session.read([row[:-1] for row in rows], all_logits=True)], 1)


def lost_rows(logits: Tensor, ranks: RequestRanks, whose: str = "the", start: int = 0) -> list[str | None]:
    """By row of logits [B, n, V], what is wrong with them; None for a good row. Every rank of the request calls it.

    Args:
        whose: what the message begins with; start: tokens of the continuation before these.
    """
    lost = ranks.request.all_reduce(is_lost(logits).int(), "max")
    first = [start + row.index(1) + 1 if 1 in row else None for row in lost.tolist()]
    return [
        None if number is None else f"{whose} logits of token {number} of the continuation are NaN or infinite: "
        f"{NOT_FINITE_BECAUSE}" for number in first
    ]  # fmt: skip


def compare(logits: Tensor, reference: Tensor, tokens: TokenRows) -> list[dict[str, float]]:
    """Per row, means over its tokens: `nll`, `kl` to the reference (both in nats), and `top1` agreement with it.

    Args:
        logits, reference: [B, n, V]; tokens: B rows of n ids, the text itself.
    """
    targets = torch.tensor([list(row) for row in tokens], device=logits.device)
    sums = torch.zeros(3, len(tokens), dtype=torch.float64)
    for start in range(0, logits.shape[1], _BLOCK):
        here = slice(start, start + _BLOCK)
        mine, theirs = (x[:, here].to(stats_dtype(x.dtype)) for x in (logits, reference))
        log_p, log_q = mine.log_softmax(-1), theirs.log_softmax(-1)
        nll = -log_p.gather(-1, targets[:, here, None])[..., 0]
        # A token that the model rules out has logits of -inf, and adds nothing.
        kl = torch.where(log_q > -torch.inf, log_q.exp() * (log_q - log_p), 0).sum(-1)
        agree = mine.argmax(-1) == theirs.argmax(-1)
        sums += torch.stack([part.double().sum(1).cpu() for part in (nll, kl, agree)])
    # Rounding can leave the divergence of equal distributions a hair below zero.
    means = (sums / logits.shape[1]).T.tolist()
    return [{"nll": nll, "kl": max(kl, 0.0), "top1": top1} for nll, kl, top1 in means]
