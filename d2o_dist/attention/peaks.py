"""Column peaks where the query heads of a KV head's group lie on several tensor ranks.

Shape legend: B rows, Hq query heads and Hkv KV heads of this rank, n queries, S slots, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.column_peaks import column_peaks


def partial_peaks(
    ranks: RequestRanks,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    softmax: Softmax,
    *,
    q_start: int = 0,
    bias: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Column peaks [B, Hkv, S] of a part of the queries: `ranks.max_replicas` of them are those of all.

    A peak is the maximum over queries of a sum over query heads. Ranks that hold copies of a KV head have different
    query heads of its group, and what each gets by itself says nothing about the maximum of the sum. So each takes a
    part of the queries, of all heads. Without copies the part is everything.

    Arguments as for `column_peaks`: q [B, Hq, n, D], k [B, Hkv, S, D], lse [B, Hq, n].
    """
    queries, first = ranks.heads_of_replicas(q)
    lse, _ = ranks.heads_of_replicas(lse.unsqueeze(-1))
    return column_peaks(
        queries, k, lse.squeeze(-1), **softmax.logits, q_start=q_start + first, bias=bias, causal=causal
    )
