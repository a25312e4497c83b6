"""How the naive oracle turns products into probabilities: docs/algorithm.md, "Soft caps and sinks"."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OracleSoftmax:
    scaling: float
    softcap: float | None = None  # "A cap bounds logits before log masses are added."
    sinks: torch.Tensor | None = None  # [Hq]

    def probabilities(
        self, head: int, products: torch.Tensor, log_mass: torch.Tensor, later: torch.Tensor
    ) -> torch.Tensor:
        """Of query head `head`: products [n, slots], log_mass [slots], later [n, slots] where not causal."""
        logits = products * self.scaling
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        # "Attention adds log_mass_j to the logit of slot j, everywhere".
        logits = (logits + log_mass).masked_fill(later, -math.inf)
        if self.sinks is None:
            return torch.softmax(logits, dim=-1)
        # "A sink is one more key of each query head, of logit s_h and value 0. Its share is nobody's."
        sink = self.sinks[head].double().expand(len(logits), 1)
        return torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[:, :-1]
