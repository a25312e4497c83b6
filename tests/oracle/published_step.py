"""One eviction as D2O's published code does it (AIoT-MLSys-Lab/d2o, LLM_merge_new, the Llama 3 cache), re-expressed.

The published class is written for 32 heads of 128; this one is for any. What it does, in its order:
- the attention a pass put on each slot is added to the scores carried so far; the pass brought exactly one new slot;
- a cache that fits into `hh_size + recent_size` is left alone;
- the first four slots score infinity, for good; the `hh_size` best of all but the last `recent_size` slots are kept;
- `u` is the cosine of an evicted key with its nearest kept key (NaN for a zero key);
- the threshold is the mean of `u` at first, then `alpha * threshold + beta * mean of u`;
- row `n` of the evicted slots (in position order, head by head) is merged if the mean over heads of `u` reaches it;
- a kept slot becomes the plain mean of itself and `u` times each slot merged into it.
Ties between scores are unspecified there; here the lower position is kept.
"""

from __future__ import annotations

import math

import torch

NUM_SINKS = 4


class PublishedStep:
    """State of one layer. Heads are cache rows: the published code keeps one per QUERY head."""

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        self.alpha, self.beta = alpha, beta
        self.threshold: float | None = None
        self.scores: torch.Tensor | None = None  # [H, live slots]

    def __call__(
        self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, hh_size: int, recent_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values [1, H, S, D]; scores [H, S], the attention of this pass. Returns the new keys and values."""
        total = scores.clone()
        if self.scores is not None:
            total[:, :-1] += self.scores
        self.scores = total
        num_heads, num_slots = total.shape
        if num_slots <= hh_size + recent_size:
            return keys, values

        num_candidates = num_slots - recent_size
        total[:, : min(NUM_SINKS, num_candidates)] = math.inf
        kept: list[list[int]] = []
        evicted: list[list[int]] = []
        for head in range(num_heads):
            ranking = sorted(range(num_candidates), key=lambda j: (-float(total[head, j]), j))
            kept.append(sorted(ranking[:hh_size]) + list(range(num_candidates, num_slots)))
            evicted.append(sorted(ranking[hh_size:]))
        self.scores = torch.stack([total[head, kept[head]] for head in range(num_heads)])

        similarity = torch.zeros(num_heads, len(evicted[0]), dtype=keys.dtype)
        nearest = torch.zeros(num_heads, len(evicted[0]), dtype=torch.int64)
        for head in range(num_heads):
            unit = keys[0, head] / keys[0, head].norm(dim=-1, keepdim=True)
            similarity[head], nearest[head] = (unit[evicted[head]] @ unit[kept[head]].T).max(dim=-1)

        mean = float(similarity.mean())
        self.threshold = mean if self.threshold is None else self.alpha * self.threshold + self.beta * mean
        merged_rows = [n for n in range(len(evicted[0])) if float(similarity[:, n].mean()) >= self.threshold]

        results = []
        for cached in (keys, values):
            heads = []
            for head in range(num_heads):
                rows = cached[0, head, kept[head]].clone()
                counts = torch.ones(len(rows), 1, dtype=rows.dtype)
                for n in merged_rows:
                    rows[nearest[head, n]] += similarity[head, n] * cached[0, head, evicted[head][n]]
                    counts[nearest[head, n]] += 1
                heads.append(rows / counts)
            results.append(torch.stack(heads)[None])
        return results[0], results[1]
