"""The memory that a prompt needs on one rank: arithmetic of the cache, the forward and the weights.

Of the cache it is exact where budgets are known beforehand. Budgets that depend on the prompt are taken as equal, which
leaves their total as it is. Of a forward it counts the tensors that are alive at once in a decoder layer.

Shape legend: B rows, T tokens of the prompt, n of them that one forward gives to this rank, S slots that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from d2o_dist.cache.compress import HEADROOM, HELD_AT_MOST
from d2o_dist.cache.window import WindowLayer
from d2o_dist.evict.prompt import heads_at_once
from d2o_dist.models.cache import CACHE_READINGS, settle_reading
from d2o_dist.plan.meshes import Share
from d2o_dist.plan.model_size import ModelSize
from d2o_dist.policy.budget import Profile, Uniform
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.layer_slots import layer_slots
from d2o_dist.policy.score import Reread
from d2o_dist.slots.slots import stats_dtype
from d2o_dist.slots.store import GROWTH
from d2o_dist.slots.windows import size_of

_POSITION_BYTES = 8
# Where slots of a head lie on several ranks: statistics of all of them, as gathered and in order, of a token and head.
_GATHERED_BYTES = 64
# Keys of a block that column sums convert, and attend to, at once.
_CONVERTED_KEYS, _BLOCK_KEYS = 4096, 512


def rules_of(model: ModelSize, d2o: D2OConfig) -> D2OConfig:
    """The configuration as the model's cache takes it, but for shares of a profile: they leave totals as they are."""
    return d2o.for_layers(model.num_full_layers, model.num_kv_heads)


def reading_of(reading: str, model: ModelSize, d2o: D2OConfig) -> str:
    """How a run reads, whose configuration says `reading`. A stream is no prompt of some length: layer by layer is what
    a chunk of it takes.

    Raises:
        ValueError: see `settle_reading`.
    """
    settled = settle_reading(reading, model.tile_refusal, d2o)
    return "layerwise" if settled == "stream" else settled


@dataclass(frozen=True)
class PromptMemory:
    """Bytes on one rank, the one with most.

    Attributes:
        reading: `whole`: all layers' slots lie in memory until the prompt is read; `layerwise`: a layer is compressed
            when its attention is done, and the hidden states of the whole prompt go from layer to layer.
        weights: of the model.
        prompt: slots of the whole prompt in all layers, positions and statistics of slots included, and the states of
            layers that keep one; one_layer: slots in one layer.
        kept: slots after compression, with their room to grow, and those states.
        statistics: what attention leaves until the prompt is compressed, in all layers at once.
        hidden: hidden states of the whole prompt, and its tables of rotary positions.
        forward: what else is alive in a layer during a forward.
        reading_peak, compressing_peak, decoding: the most at once in these phases, without weights.
    """

    reading: str
    weights: int
    prompt: int
    one_layer: int
    kept: int
    statistics: int
    hidden: int
    forward: int
    reading_peak: int
    compressing_peak: int
    decoding: int

    @property
    def beside_weights(self) -> int:
        """The most at once, without weights."""
        return max(self.reading_peak, self.compressing_peak, self.decoding)

    @property
    def peak(self) -> int:
        """The most at once, weights included."""
        return self.weights + self.beside_weights


def prompt_memory(
    model: ModelSize,
    d2o: D2OConfig,
    share: Share,
    tokens: int,
    batch: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    chunk: int | None = None,
    reading: str = "whole",
) -> PromptMemory:
    """What `batch` prompts of `tokens` tokens need on the fullest rank.

    Args:
        chunk: tokens of one forward, of all sequence ranks together; None: the whole prompt.
        reading: one of `CACHE_READINGS`; see `reading_of`.
    """
    assert reading in CACHE_READINGS, reading
    full, slot = model.num_full_layers, _slot_bytes(model, dtype)
    here = -(-tokens // share.sp)  # tokens of a rank where tokens are dealt
    heads, width = (share.kv_here, tokens) if share.reads_by_heads else (share.kv_heads, here)
    one_layer = batch * heads * width * slot
    states = batch * (model.states * dtype.itemsize + model.exact_states * 4)
    prompt = full * one_layer + _window_bytes(model, tokens, batch * heads * slot) + states
    kept, tables, growth = _kept_bytes(model, d2o, share, tokens, batch, dtype)
    of_layer = _statistics_bytes(model, d2o, share, width, batch, dtype)
    hidden = batch * here * (model.hidden + 2 * model.head_dim) * dtype.itemsize
    forward = _forward_bytes(model, d2o, share, tokens, batch, dtype, chunk)

    # The slots that stay and those that go are copied apart; to merge, their keys once more.
    copies = 0 if d2o.keeps_everything else one_layer * (2 if d2o.merge.merges else 1)
    at_once = heads_at_once(batch, width, model.head_dim)
    if d2o.budget.per_head:
        copies //= share.kv_here
    elif share.sp == 1 and at_once < heads and not d2o.keeps_everything:
        # Those that go head by head; those that stay are put together from their heads.
        stays = kept / max(full, 1) * (1 if d2o.knows_budgets or reading == "whole" else HEADROOM)
        copies = copies * at_once // heads + 2 * min(one_layer, round(stays))
    copies = max(copies, _rate_bytes(model, d2o, share, dtype))
    if not share.reads_by_heads:
        copies += batch * share.kv_heads * tokens * _GATHERED_BYTES
    if reading == "layerwise":
        moves_early = d2o.knows_budgets and share.holds_by_heads and share.sp == 1
        if d2o.eviction_interval is not None and moves_early:
            held = kept  # of all layers, in the arena, from the beginning
        else:
            held = round(kept * (1 if d2o.knows_budgets else HELD_AT_MOST) * (full - 1) / max(full, 1))
        reading_peak = held + one_layer + of_layer + hidden + forward
        moved = 0 if moves_early or d2o.eviction_interval is None else 2 * kept + hidden
        n = -(-min(chunk or tokens, tokens) // share.sp)
        # The last tile's queries, keys and values, what they were made of, and what attention gives.
        tile = batch * n * (model.hidden + 2 * (share.query_heads + share.kv_heads) * model.head_dim) * dtype.itemsize
        compressing_peak = max(held + one_layer + of_layer + hidden + tile + copies, moved)
    else:
        reading_peak = prompt + full * of_layer + forward
        # Layer after layer; then what is left of all of them moves into the arena.
        compressing_peak = max(prompt + copies, states + 2 * kept if d2o.eviction_interval is not None else 0)
    return PromptMemory(
        reading=reading,
        weights=weight_bytes(model, share, dtype),
        prompt=prompt,
        one_layer=one_layer,
        kept=kept + states,
        statistics=full * of_layer,
        hidden=hidden,
        forward=forward,
        reading_peak=reading_peak,
        compressing_peak=compressing_peak,
        decoding=kept + states + tables + growth,
    )


def weight_bytes(model: ModelSize, share: Share, dtype: torch.dtype) -> int:
    """Of one rank. DeepSpeed's AutoTP cuts the layers' matrices, transformers' plan embeddings and experts too."""
    cut = model.matrices + model.kv_matrices * share.copies
    more = (model.embeddings + model.experts) // share.cuts_of_more
    return (cut // share.tp + more + model.others + model.whole_matrices) * dtype.itemsize


def slots_of_layers(model: ModelSize, d2o: D2OConfig, tokens: int) -> list[int | None]:
    """Slots that each compressed layer keeps of a prompt, or each of its KV heads where these have budgets of their
    own; None: it is never evicted. Shares that are measured on the prompt, or not looked up, are taken as equal."""
    full = [index for index, window in enumerate(model.windows) if window is None]
    if not full:
        return []
    protected = d2o.budget.protected(model.num_layers)
    units = model.num_kv_heads if d2o.budget.per_head else 1
    never = [n * units + unit for n, index in enumerate(full) if index in protected for unit in range(units)]
    rule = d2o.replace(budget={"protected_layers": tuple(never)}).budget
    is_open = d2o.keeps_everything or not rule.is_known_before or (isinstance(rule, Profile) and rule.shares is None)
    log_weights = (Uniform() if is_open else rule).log_weights(len(full) * units, None)
    slots = layer_slots(log_weights, tokens, rule, d2o.size)
    return [None if number in never else count for number, count in enumerate(slots)]


def _slot_bytes(model: ModelSize, dtype: torch.dtype) -> int:
    """Of a slot of one KV head: key and value, position, three statistics."""
    return model.pair * dtype.itemsize + _POSITION_BYTES + 3 * stats_dtype(dtype).itemsize


def _window_bytes(model: ModelSize, tokens: int, slot: int) -> int:
    """Of layers with a window, which are trimmed with some room once they hold more than a query sees."""
    sizes = [size_of(window) for window in model.windows if window is not None]
    return slot * sum(tokens if tokens < size else size + WindowLayer.SLACK for size in sizes)


def _kept_bytes(
    model: ModelSize, d2o: D2OConfig, share: Share, tokens: int, batch: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Of what is kept; of the table of its newest slots; of the growth of layers that are never evicted."""
    slot = batch * (share.kv_here if share.holds_by_heads else share.kv_heads) * _slot_bytes(model, dtype)
    interval = d2o.eviction_interval or 0
    slots = slots_of_layers(model, d2o, tokens)
    rooms = [tokens if budget is None else budget + interval for budget in slots]
    rooms = [room if share.holds_by_heads else -(-room // share.sp) for room in rooms]
    units = max(len(slots) // max(model.num_full_layers, 1), 1)  # of a layer; each is one of its heads then
    newest = sum(d2o.split(budget)[1] for budget in slots if budget is not None) if interval else 0
    never = sum(budget is None for budget in slots) if interval else len(slots)
    kept = slot * sum(rooms) // units + _window_bytes(model, tokens, slot)
    tables = slot // _slot_bytes(model, dtype) * newest // units * _POSITION_BYTES
    return kept, tables, slot * never // units * GROWTH


def _statistics_bytes(
    model: ModelSize, d2o: D2OConfig, share: Share, width: int, batch: int, dtype: torch.dtype
) -> int:
    """Of one layer with `width` slots a head: column sums or peaks, and the last queries."""
    queries, heads = share.query_heads, share.kv_heads
    if share.reads_by_heads:
        queries, heads = share.queries_here, share.kv_here
    stat = stats_dtype(dtype).itemsize
    found = d2o.num_last_queries * queries * (model.head_dim * dtype.itemsize + stat)
    found += queries * width * stat if d2o.needs_column_sums else 0
    found += heads * width * stat if d2o.needs_reread else 0
    return batch * found


def _rate_bytes(model: ModelSize, d2o: D2OConfig, share: Share, dtype: torch.dtype) -> int:
    """Blocks that the rates of a layer are measured with: converted keys, queries and logits."""
    heads, width = (share.kv_here if share.reads_by_heads else share.kv_heads), model.head_dim + 1
    queries = d2o.statistics.rate_window * model.num_heads // model.num_kv_heads
    blocks = heads * (_CONVERTED_KEYS * width + queries * (_BLOCK_KEYS + width))
    return blocks * stats_dtype(dtype).itemsize if d2o.needs_rates else 0


def _forward_bytes(
    model: ModelSize, d2o: D2OConfig, share: Share, tokens: int, batch: int, dtype: torch.dtype, chunk: int | None
) -> int:
    """Tensors alive in a layer at once: hidden states, and the larger of attention's and the MLP's."""
    item, stat, dim = dtype.itemsize, stats_dtype(dtype).itemsize, model.head_dim
    columns = min(chunk or tokens, tokens)
    if isinstance(d2o.score, Reread):
        columns = max(columns, min(d2o.score.chunk, tokens))
    n = -(-columns // share.sp)
    # The embeddings, the layer's input, its middle and the norm of that; the two tables of rotary positions.
    always = n * (4 * model.hidden + 2 * dim) * item
    # Queries, keys and values before and after rotation, and what attention gives.
    attention = n * (3 * share.query_heads + 3 * share.kv_heads) * dim * item
    if model.latent is not None:
        # Queries, keys and values of all heads as the model makes them; queries over latents, and their parts; what
        # attention gives, of latents and of values.
        key, value = model.config.qk_nope_head_dim + model.config.qk_rope_head_dim, model.config.v_head_dim
        attention = n * share.query_heads * (3 * key + 3 * value + 2 * dim + model.latent) * item
    if share.sp > 1 and share.reads_by_heads:
        attention += 2 * n * (share.query_heads + 2 * share.kv_heads) * dim * item  # packed, and arrived
    elif share.parallel.sp_prefill == "ring":
        attention += 2 * -(-tokens // share.sp) * share.kv_heads * model.pair * item  # one that comes, one that goes
    elif share.sp > 1:
        attention += 3 * tokens * model.pair * item  # a head as gathered and in order, and the next on its way
        attention += 3 * share.query_heads * tokens * stat if d2o.needs_column_sums else 0
    mlp = 3 * n * model.mlp // share.tp * item
    # A token's copy for each of its experts, what it gives back, and the three tensors of the MLP between.
    mlp += n * model.experts_per_token * (2 * model.hidden + 3 * model.expert_mlp // share.cuts_of_more) * item
    return batch * (always + max(attention, mlp))
