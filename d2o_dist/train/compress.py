"""Compression inside a training step: what D2O keeps of a prompt, as a function of the prompt's keys and values.

Statistics, budgets, selection, nearest target, gate and the weights of the merge are constants of the step: they are
computed by the same functions that inference uses, without gradients. Kept and merged keys and values carry gradients.

Shape legend: B rows, Hq query heads, Hkv key/value heads, T prompt tokens, S slots, D head dim, L compressed layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.cache.plans import on_full_layers
from d2o_dist.core.autocast import without_autocast
from d2o_dist.evict.budgets import eviction_budget, row_log_weights, row_slots
from d2o_dist.evict.judge import Nearest
from d2o_dist.evict.prompt import Whole, evict_ordered
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.policy import D2OConfig
from d2o_dist.policy.layer_slots import check_total
from d2o_dist.policy.statistics import COLUMN_SUMS
from d2o_dist.slots.slots import D2OState, Slots
from d2o_dist.train.passes import PromptLayer
from d2o_dist.train.past import Past, window_past

# [B, h, X] of the heads at hand -> [B, H, X] of all heads, in the order of the heads; the same on every rank.
GatherHeads = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DealtHeads:
    """The exchange of ranks that have some heads each, and no copies. Attributes: gather: of reports."""

    gather: GatherHeads
    own_heads: None = None
    per_head: bool = False

    def from_first_copy(self, tensor: Tensor) -> Tensor:
        """There is but one."""
        return tensor

    def reports(self, reports: Tensor, *found: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `evict.exchange.Exchange.reports`."""
        return self.gather(reports), *found


@dataclass(frozen=True)
class Compressed:
    """A compressed prompt.

    Attributes:
        pasts: by layer of the model; sliding-window layers are among them, uncompressed.
        slots: by row, the slots that each full-attention layer was evicted to, in the order of the layers.
        num_tokens: T.
        is_finite: whether the attention of the prompt was; otherwise nothing is evicted, and losses mean nothing.
    """

    pasts: dict[int, Past]
    slots: list[list[int]]
    num_tokens: int
    is_finite: bool = True

    @property
    def achieved_keep_ratio(self) -> float:
        """Slots held over the tokens of the full cache, over the full-attention layers of all rows."""
        held = [min(slots, self.num_tokens) for row in self.slots for slots in row]
        return sum(held) / (self.num_tokens * len(held)) if held else 1.0


def compress_prompt(
    layers: Mapping[int, PromptLayer],
    config: D2OConfig,
    *,
    gather_heads: GatherHeads = lambda reports: reports,
    nearest: Nearest = nearest_kept,
) -> Compressed:
    """Evict every full-attention layer of a prompt to its budget, as `finalize` does at inference.

    Args:
        layers: of all layers of the model, with the heads at hand.
        config: as `settle_rules` has it for the model; `protected_layers` are layers of the model.
        gather_heads: brings together what the heads of all ranks report; all heads are here by default.
        nearest: what finds the nearest target of each evicted key; it is given detached keys.

    Raises:
        ValueError: protected layers or minima that exceed the total.
    """
    full = [index for index in sorted(layers) if layers[index].window is None]
    pasts = {index: window_past(layer.keys, layer.values, layer.window) for index, layer in layers.items()}
    num_tokens = next(iter(layers.values())).keys.shape[2]
    if not full:
        return Compressed(pasts, [], num_tokens)
    config = on_full_layers(config, [layers[index].window for index in sorted(layers)])
    check_total(config.budget, config.size, len(full))
    protected = config.budget.protected(len(full))
    slots = _slot_budgets([layers[index] for index in full], num_tokens, config, gather_heads)
    if slots is None:
        # No error: a rank that leaves a step alone leaves the others in their collectives.
        return Compressed(pasts, [], num_tokens, is_finite=False)

    def nearest_constant(evicted: Tensor, kept: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
        return nearest(evicted.detach(), kept.detach(), is_target)

    with without_autocast():
        for place, index in enumerate(full):
            if place in protected:
                continue
            budget = [row[place] for row in slots]
            past = _evict_layer(layers[index], budget, config, gather_heads, nearest_constant)
            if past is not None:
                pasts[index] = past
    return Compressed(pasts, slots, num_tokens)


@torch.no_grad()
def _slot_budgets(
    layers: list[PromptLayer], num_tokens: int, config: D2OConfig, gather_heads: GatherHeads
) -> list[list[int]] | None:
    """[B][L] slots; None where attention is not finite. The variances of all layers and heads meet in one exchange."""
    batch = layers[0].keys.shape[0]
    variances: list[Tensor | None] = [None] * batch
    if COLUMN_SUMS in config.budget.statistics and not config.keeps_everything:
        at_hand = torch.stack([layer.variances for layer in layers], -1)  # [B, h, L]
        everyone = gather_heads(at_hand)
        if not bool(everyone.isfinite().all()):
            return None
        variances = list(everyone.transpose(1, 2).contiguous())
    weights = [row_log_weights(row, config, len(layers))[0] for row in variances]
    return [row_slots(row, num_tokens, None, config) for row in weights]


def _evict_layer(
    layer: PromptLayer, slots: list[int], config: D2OConfig, gather_heads: GatherHeads, nearest: Nearest
) -> Past | None:
    """What is left of one layer; None where no row is over its budget."""
    batch, heads, num_tokens, _ = layer.keys.shape
    device = layer.keys.device
    job = eviction_budget(slots, [num_tokens] * batch, config, device)
    if job is None:
        return None
    budget, kv_len = job
    positions = torch.arange(num_tokens, device=device).expand(batch, heads, num_tokens)
    held = Slots(layer.keys, layer.values, positions, layer.scores, layer.rates, torch.zeros_like(layer.scores))
    kept, _ = evict_ordered(
        Whole(held, DealtHeads(gather_heads)), budget, D2OState(), config,
        seen=torch.full((batch,), num_tokens, device=device), nearest=nearest,
    )  # fmt: skip
    ragged = min(kv_len) != max(kv_len)
    return Past(
        kept.keys,
        kept.values,
        kept.log_mass if config.merge.keeps_mass else None,
        kept.live[:, 0] if ragged else None,
    )
