"""The training objectives: from a batch of rows to sums of losses, and how many tokens each is a sum over.

Shape legend: B rows, T tokens of a row (C of its context, n of its continuation), t tokens of them at this rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from d2o_dist.config.distill import DistillConfig
from d2o_dist.evict.judge import Nearest
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.policy import D2OConfig
from d2o_dist.train.attention import PASS_KEYWORD
from d2o_dist.train.compress import Compressed, compress_prompt
from d2o_dist.train.losses import IGNORED, distill_loss, lm_loss
from d2o_dist.train.passes import ContinuationPass, Pass, PlainPass, PromptLayer, PromptPass, full_pasts
from d2o_dist.train.ulysses import GradientExchange


@dataclass(frozen=True)
class Part:
    """Tokens of one forward, at this rank.

    Attributes:
        input_ids, position_ids: [B, t] int64.
        targets: [B, t] int64, the token each predicts; IGNORED where none is counted.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor

    @property
    def counted(self) -> Tensor:
        """[B, t] bool: tokens that have a target."""
        return self.targets != IGNORED


@dataclass(frozen=True)
class Losses:
    """Sums over the tokens at this rank, in nats, each a differentiable scalar; the objective is `total`.

    Attributes:
        total: the weighted sum that is trained.
        sums: name -> sum of one loss, detached: `lm`, `kl`, `context_lm`.
        achieved_keep_ratio: of the compressed prompt; None without compression.
        attends: whether the attention of the prompt was finite; otherwise the losses are not either.
    """

    total: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    achieved_keep_ratio: float | None = None
    attends: bool = True


class Objective(nn.Module):
    """A causal language model with its losses. Its forward is the whole forward of a step, so that an engine that
    wraps modules (DeepSpeed) sees one call.

    Args:
        model: a Hugging Face causal language model, or one wrapped by peft, that attends through `d2o_train`.
        exchange: between the ranks that share the rows' tokens.
        distill: weights and teacher of `d2o_distill`.
        loss_tile: tokens whose logits exist at once.
    """

    def __init__(self, model: nn.Module, exchange: GradientExchange, distill: DistillConfig, loss_tile: int) -> None:
        super().__init__()
        self.model = model
        self.exchange = exchange
        self.distill = distill
        self.loss_tile = loss_tile

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model, without peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def forward(self, kind: str, **kwargs: Any) -> Losses:
        """`lm`: see `plain`; `d2o_lm` and `d2o_distill`: see `compressed`."""
        return self.plain(**kwargs) if kind == "lm" else self.compressed(distills=kind == "d2o_distill", **kwargs)

    def measure(self, context: Part, continuation: Part, configs: Sequence[D2OConfig]) -> list[dict[str, Tensor]]:
        """Sums over the continuation, without gradients, under each way to compress (all that evict need the same
        statistics).

        `full_lm`: the loss over the full cache; `lm`: over the compressed one; `kl`: KL(full || compressed).
        """
        head = self.causal_lm.get_output_embeddings()
        with torch.no_grad():
            _, layers = self.read_prompt(context, next((d2o for d2o in configs if not d2o.keeps_everything), None))
            full = self.read_full(continuation, layers)
            full_lm = self._lm(full, continuation)
            found = []
            for d2o in configs:
                past = compress_prompt(layers, d2o, gather_heads=self.exchange.gather_heads)
                hidden = self.read_continuation(continuation, past)
                kl = distill_loss(head, hidden, full, continuation.counted, self.loss_tile)
                odd = 0.0 if past.is_finite else math.nan
                found.append({"kl": kl + odd, "lm": self._lm(hidden, continuation) + odd, "full_lm": full_lm})
        return found

    # ---- objectives ----------------------------------------------------------------------------------------------

    def plain(
        self, row: Part, documents: list[list[int]] | None = None, counts: Mapping[str, float] | None = None
    ) -> Losses:
        """Language modelling with full attention inside each document.

        Args:
            documents: per row the lengths of its documents over all ranks; None: a row is one document.
            counts: what the sum over each part (`row`) is divided by in the total; 1 where not given.
        """
        loss = self._lm(self._hidden(row, PlainPass(self.exchange, documents)), row)
        return Losses(loss / _count(counts, "row"), {"lm": loss.detach()})

    def compressed(
        self,
        context: Part,
        continuation: Part,
        d2o: D2OConfig,
        distills: bool,
        counts: Mapping[str, float] | None = None,
        nearest: Nearest = nearest_kept,
    ) -> Losses:
        """The context is read with full attention and compressed; the continuation is predicted from what is left.

        Args:
            d2o: how to compress; the same on all ranks.
            distills: KL to the full cache, with the weights of `distill`; otherwise language modelling alone.
            counts: what the sums over `context` and `continuation` are divided by in the total; 1 where not given.
            nearest: what finds the nearest target of an evicted key.
        """
        hidden, layers = self.read_prompt(context, d2o)
        past = compress_prompt(layers, d2o, gather_heads=self.exchange.gather_heads, nearest=nearest)
        student = self.read_continuation(continuation, past)
        weights = self.distill if distills else DistillConfig(kl_weight=0.0, lm_weight=1.0)
        terms: dict[str, tuple[float, Tensor]] = {}
        if weights.kl_weight:
            teacher = self._teacher(context, continuation, layers)
            head = self.causal_lm.get_output_embeddings()
            kl = distill_loss(head, student, teacher, continuation.counted, self.loss_tile, weights.temperature)
            terms["kl"] = (weights.kl_weight, kl)
        if weights.lm_weight:
            terms["lm"] = (weights.lm_weight, self._lm(student, continuation))
        if weights.context_lm_weight:
            terms["context_lm"] = (weights.context_lm_weight, self._lm(hidden, context))
        total = sum(
            weight / _count(counts, "context" if name == "context_lm" else "continuation") * term
            for name, (weight, term) in terms.items()
        )
        if not past.is_finite:
            total = total + math.nan
        sums = {name: term.detach() for name, (_, term) in terms.items()}
        return Losses(total, sums, past.achieved_keep_ratio, past.is_finite)

    # ---- forwards ------------------------------------------------------------------------------------------------

    def read_prompt(self, context: Part, d2o: D2OConfig | None) -> tuple[Tensor, dict[int, PromptLayer]]:
        """Hidden states [B, t, H] of the context, and what each layer's attention leaves behind."""
        step = PromptPass(self.exchange, d2o)
        return self._hidden(context, step), step.layers

    def read_continuation(self, continuation: Part, past: Compressed) -> Tensor:
        """Hidden states [B, t, H] of the continuation over a compressed context."""
        return self._hidden(continuation, ContinuationPass(self.exchange, past.pasts))

    def read_full(self, continuation: Part, layers: dict[int, PromptLayer]) -> Tensor:
        """Hidden states [B, t, H] of the continuation over the whole context; without gradients into the context."""
        return self._hidden(continuation, ContinuationPass(self.exchange, full_pasts(layers)))

    @torch.no_grad()
    def _teacher(self, context: Part, continuation: Part, layers: dict[int, PromptLayer]) -> Tensor:
        """The full cache's hidden states of the continuation: of the model as it is, or of the model without LoRA."""
        if self.distill.teacher == "current":
            return self.read_full(continuation, layers)
        with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext():
            _, base = self.read_prompt(context, None)
            return self.read_full(continuation, base)

    def _hidden(self, part: Part, step: Pass) -> Tensor:
        out = self.causal_lm.get_decoder()(
            input_ids=part.input_ids, position_ids=part.position_ids, use_cache=False, **{PASS_KEYWORD: step}
        )
        return out.last_hidden_state

    def _lm(self, hidden: Tensor, part: Part) -> Tensor:
        return lm_loss(self.causal_lm.get_output_embeddings(), hidden, part.targets, self.loss_tile)


def _count(counts: Mapping[str, float] | None, part: str) -> float:
    """The divisor of a part; never 0, as a step may happen to count nothing in one."""
    return max(counts[part], 1) if counts else 1
