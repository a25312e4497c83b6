"""`D2OCache`: a compressed cache in the shape that Hugging Face models and `generate` know.

Shape legend: B rows, Hkv key/value heads, S slots, n tokens of a chunk, D head dim.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from d2o_dist.cache.report import CacheReport, make_report
from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.cache.step import DecodeStep
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.core.autocast import without_autocast
from d2o_dist.integrations.hf.attention import CACHE_TAG
from d2o_dist.integrations.hf.ended import EndedRows
from d2o_dist.integrations.hf.guards import check_attention, layer_windows, text_config
from d2o_dist.integrations.hf.heads import request_ranks
from d2o_dist.integrations.hf.rope import BORDER, check_side, is_let_go_of, rope_border
from d2o_dist.integrations.hf.supported import check_supported, check_windows
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.score import Reread


class D2OLayer(CacheLayerMixin):
    """A view of one layer of a `D2OCache`. Read the slots here; the cache itself does the work.

    Where ranks share the request the tensors are this rank's, and `kv_len` counts the slots of all ranks.

    Attributes:
        keys, values: [B, Hkv, S, D]; positions: [B, Hkv, S] int64, -1 on an unused slot.
        scores, rates, log_mass: [B, Hkv, S] float32 (float64 for a float64 model).
        All are None before the first token.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, cache: CompressedCache, index: int) -> None:
        # The mixin's own __init__ would assign `keys`; here they are looked up.
        self._cache = cache
        self.index = index
        self.is_sliding = cache.windows[index] is not None

    def __repr__(self) -> str:
        return f"D2OLayer({self.index}, {'sliding' if self.is_sliding else 'compressed'}, held={self.kv_len})"

    def _tensor(self, name: str) -> Tensor | None:
        slots = self._cache.layers[self.index].store.slots if self._cache.layers else None
        return None if slots is None else getattr(slots, name)

    keys = property(lambda self: self._tensor("keys"))
    values = property(lambda self: self._tensor("values"))
    positions = property(lambda self: self._tensor("positions"))
    scores = property(lambda self: self._tensor("scores"))
    rates = property(lambda self: self._tensor("rates"))
    log_mass = property(lambda self: self._tensor("log_mass"))
    is_initialized = property(lambda self: self.shape is not None)
    dtype = property(lambda self: self._cache.layers[self.index].store.dtype if self._cache.layers else None)
    device = property(lambda self: None if self.keys is None else self.keys.device)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(Hkv, D) of what is held here; None before the first token."""
        return self._cache.layers[self.index].store.shape if self._cache.layers else None

    @property
    def kv_len(self) -> list[int]:
        """Slots held by each row, of its fullest head where heads have budgets of their own."""
        return list(self._cache.layers[self.index].kv_len) if self._cache.layers else []

    @property
    def mean_kv_len(self) -> list[float]:
        """Slots held by each row, mean over the KV heads."""
        return list(self._cache.layers[self.index].mean_kv_len) if self._cache.layers else []

    @property
    def threshold(self) -> Tensor | None:
        """[B] moving similarity threshold, NaN before a row's first eviction; None before any, or if never used.

        Where heads have budgets of their own: the mean over the heads of this rank.
        """
        return None if self.is_sliding or not self._cache.layers else self._cache.layers[self.index].state.threshold

    @property
    def slot_budgets(self) -> list[float] | None:
        """Slots each row is evicted to, mean over the KV heads; None before finalize, and for layers that are never
        evicted."""
        return None if self.is_sliding or not self._cache.layers else self._cache.layers[self.index].slot_budgets

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers are made by the first chunk."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        raise ValueError("a D2OLayer is updated through its D2OCache: call cache.update(keys, values, layer_idx)")

    def get_seq_length(self) -> int:
        """Tokens seen (columns of the batch), not slots held: position ids and masks derive from it."""
        return self._cache.num_seen_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask over everything seen."""
        return self._cache.num_seen_columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: a compressed cache sets no limit on the tokens it sees."""
        return -1

    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        raise ValueError("a D2OCache cannot be offloaded layer by layer; it is small enough to stay")

    prefetch = offload


class D2OCache(Cache):
    """A KV cache that keeps a fraction of the tokens and folds many of the others into them.

    Pass it as `past_key_values` to a model loaded with `attn_implementation="d2o"`. One cache serves one batch, over
    as many turns as wanted; `copy.deepcopy(cache)` reuses a prompt.

    Args:
        config: the model's configuration (`model.config`).
        d2o: how to compress; `D2OConfig()` by default.
        mesh: the ranks that share the request; this process alone by default. With tensor ranks the model must be
            sharded over `mesh.axis("tp")`, and every rank must make the same calls. With sequence ranks a prompt is
            read by `model(**cache.deal(input_ids, attention_mask), past_key_values=cache)`.
        parallel: how they share it; by default as `ParallelConfig` has it, with the sizes of the mesh.
        counter: where the traffic between ranks is counted.

    Raises:
        ValueError: a model whose attention is not or cannot be `d2o`, that is not supported or has no layer to be
            compressed, a budget that this model's layers cannot have, or heads that the ranks cannot share.
    """

    def __init__(
        self,
        config: Any,
        d2o: D2OConfig | None = None,
        mesh: ParallelMesh | None = None,
        parallel: ParallelConfig | None = None,
        counter: TrafficCounter | None = None,
    ) -> None:
        if d2o is not None and not isinstance(d2o, D2OConfig):
            raise ValueError(f"d2o must be a D2OConfig, not {type(d2o).__name__}")
        check_supported(config)
        self.model_config, d2o = text_config(config), d2o or D2OConfig()
        check_attention(self.model_config)
        windows = layer_windows(self.model_config)
        check_windows(self.model_config, windows, d2o.keep_ratio)
        self.ranks = request_ranks(self.model_config, mesh, parallel, counter)
        self.compressed = CompressedCache(d2o, windows, self.ranks)
        self._border, self._is_true = rope_border(config), not is_let_go_of(config)
        # Tokens of the longest text that a forward had positions for.
        self._longest = 0
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        self._pending: int | None = None
        self._shape: tuple[Any, ...] | None = None
        super().__init__(layers=[D2OLayer(self.compressed, index) for index in range(len(self.compressed.windows))])

    @property
    def d2o(self) -> D2OConfig:
        """The configuration of the compression."""
        return self.compressed.config

    def __bool__(self) -> bool:
        """False for models whose `generate` asks `if past_key_values` only to let go of the cache; True for others."""
        return self._is_true

    def __repr__(self) -> str:
        return f"D2OCache(seen={self.compressed.num_seen}, phase={self.compressed.phase}, layers={self.layers})"

    # ---- called by the model -------------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announce a layer's new keys and values; the attention function stores them, once it knows the padding.

        Raises:
            ValueError: attention is not `d2o`, or the model is not the one this cache was filled by.
        """
        check_attention(self.model_config)
        if self._pending is not None:
            raise ValueError(
                f"the keys of layer {self._pending} never reached d2o attention: the model was not loaded with "
                'attn_implementation="d2o", or its attention does not use the attention interface. Make a new cache'
            )
        self._check_shape(key_states, layer_idx)
        self._pending = layer_idx
        # An alias, so that the tag is not left on the model's own tensor.
        tagged = key_states.view_as(key_states)
        setattr(tagged, CACHE_TAG, self)
        return tagged, value_states

    @property
    def pending_window(self) -> int | None:
        """The window of the layer whose keys were announced; None: full attention, or no such layer."""
        return None if self._pending is None else self.compressed.windows[self._pending]

    def _check_shape(self, keys: Tensor, layer_idx: int) -> None:
        if layer_idx >= len(self.layers):
            raise ValueError(f"layer {layer_idx} uses the cache, but it was made for {len(self.layers)} layers")
        batch, heads, _, dim = keys.shape
        shape = {"batch size": batch, "dtype": keys.dtype, "device": keys.device}
        if self._shape is not None and shape != self._shape:
            name = next(name for name in shape if shape[name] != self._shape[name])
            raise ValueError(
                f"the cache was filled with {name} {self._shape[name]} and is now used with {shape[name]}: the model "
                "or the batch changed, or layers lie on several devices (device_map), which a D2OCache cannot serve. "
                "Make a new cache (or select rows with batch_select_indices)"
            )
        self._shape = shape
        held = self.layers[layer_idx].shape
        if held is not None and not self.ranks.deals_tokens and held != (heads, dim):
            raise ValueError(
                f"layer {layer_idx} has {heads} KV heads of dim {dim}, but the cache holds {held[0]} of dim {held[1]}: "
                "the model changed. Make a new cache"
            )

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Called by d2o attention: store the announced keys and values, and attend: [B, Hq, n, D].

        Args:
            mask: 2D, of all columns; positions: the position ids of the new ones. None says nothing.
        """
        layer, self._pending = self._pending, None
        if layer is None:
            raise ValueError("d2o attention met keys of this cache that were not announced by update()")
        known = self._modules.setdefault(layer, weakref.ref(module))
        if known() is not module:
            raise ValueError(f"layer {layer} of another model uses this cache; it belongs to the model that filled it")
        if layer == 0 and self._border is not None and positions is not None and not self.compressed.step_announced:
            self._check_side(int(positions.max()) + 1)
        # Detached: a slot must not keep the graph of the forward that made it alive. The tag is gone too.
        return self.compressed.attend(layer, query, key.detach(), value.detach(), scale, mask, positions)

    def _check_side(self, length: int) -> None:
        """Of a forward with positions below `length`: it must be on the side of the model's border that all are on."""
        if self.compressed.num_seen_columns:
            check_side(self._border, min(length, self._longest), max(length, self._longest))
        self._longest = max(length, self._longest)

    def with_config(self, d2o: D2OConfig) -> D2OCache:
        """A copy of a cache that has read a prompt and compressed nothing yet, to be compressed as `d2o` says.

        For several configurations on one prompt: what is read under one serves the others, if it gathered what they
        need (`Reach(add_accumulated=True)` gathers everything but a second reading).

        Raises:
            ValueError: the cache was finalized, has seen nothing, or lacks statistics that `d2o` needs.
        """
        copied = copy.deepcopy(self)
        copied.compressed.adopt(d2o)
        return copied

    # ---- decode steps that are recorded --------------------------------------------------------------------------

    def begin_step(self, present: Sequence[bool] | None = None) -> DecodeStep:
        """Announce a decode step; the model's forward, or a replay of one, and `end_step` must follow.

        See `CompressedCache.begin_step`. A forward without it is a decode step all the same.
        """
        self._check_side(max(self.compressed.num_seen, default=0) + 1)
        return self.compressed.begin_step(present)

    def end_step(self) -> None:
        """After the forward or the replay of an announced step: count its tokens, and evict what is due."""
        self.compressed.end_step()

    def abandon_step(self) -> None:
        """Take back an announced step whose forward was recorded, not run, and broken off."""
        self._pending = None
        self.compressed.abandon_step()

    # ---- prompts that are read twice ------------------------------------------------------------------------------

    @torch.no_grad()
    def reread(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, chunk: int | None = None
    ) -> None:
        """Read the prompts a second time, for the score rule `reread`: after the first reading, before `finalize()`.

        Every rank of the request calls it with the same whole prompts; sequence ranks share each chunk of them.

        The model repeats the prompts, and what it looks up in the cache to do so is worth keeping, whatever will be
        asked. Each `chunk` tokens of a row are one forward, at the positions that follow the prompt; it
        attends to the whole cache and to itself, and nothing of it is kept.

        Args:
            model: that has read the prompts.
            input_ids: [B, T] int64, the prompts, all that the cache has seen; attention_mask: [B, T], 0 marks padding;
                None: no padding.
            chunk: tokens of a forward; by default that of the score rule.

        Raises:
            ValueError: other prompts than those of the cache, as far as their lengths tell; no first reading, or one
                that was compressed already, or whose tokens ranks share by `allgather` or `ring`; positions that the
                model does not have.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask {tuple(mask.shape)} must have input_ids' shape {tuple(input_ids.shape)}")
        rows = [ids[keep.bool()] for ids, keep in zip(input_ids, mask, strict=True)]
        chunk = getattr(self.d2o.score, "chunk", Reread().chunk) if chunk is None else chunk
        lengths, seen = [len(row) for row in rows], self.compressed.num_seen
        if lengths != seen:
            raise ValueError(f"the prompts to read a second time have {lengths} tokens, but the cache has seen {seen}")
        last = max(count + min(count, chunk) for count in seen)
        check_side(self._border, max(seen), last)
        limit = getattr(self.model_config, "max_position_embeddings", None)
        if limit is not None and last > limit:
            raise ValueError(
                f"a second reading of {max(seen)} tokens in chunks of {chunk} (score.chunk) needs {last} positions, "
                f"but the model has {limit}"
            )
        with self.compressed.rereading(chunk):
            for start in range(0, max(lengths), chunk):
                parts = [row[start : start + chunk] for row in rows]
                width = max(len(part) for part in parts)
                ids, padding = input_ids.new_zeros(len(rows), width), mask.new_zeros(len(rows), width)
                for row, part in enumerate(parts):
                    ids[row, width - len(part) :], padding[row, width - len(part) :] = part, 1
                model(**self.deal(ids, padding), past_key_values=self, use_cache=True, logits_to_keep=1)

    # ---- prompts that ranks share --------------------------------------------------------------------------------

    def deal(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """This rank's part of a chunk of prompt, as arguments of the model's forward, which must follow.

        Every rank of the request calls it with the same whole chunk. In the part of a row its tokens are the last
        columns; outputs of the columns before them mean nothing.

        Args:
            input_ids: [B, n] int64; attention_mask: [B, n] of this chunk alone, 0 marks padding; None: no padding.

        Raises:
            ValueError: a chunk without a token, or of another batch size than the cache's; with sequence ranks, a text
                beyond the border of `longrope`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask {tuple(mask.shape)} must have input_ids' shape {tuple(input_ids.shape)}")
        counts, seen = mask.bool().sum(1).tolist(), self.compressed.num_seen or [0] * len(mask)
        length = max(map(sum, zip(seen, counts, strict=False)), default=0)
        if self._border is not None and self.ranks.sp.size > 1 and length > self._border:
            raise ValueError(
                f"sp ({self.ranks.sp.size}) cannot read a text of {length} tokens, beyond {BORDER} ({self._border}): a "
                "rank that has none of the tokens beyond would turn its own otherwise. Use sp 1"
            )
        deal = self.compressed.deal(mask)
        ids = input_ids.new_zeros(input_ids.shape[0], deal.width)
        positions = torch.zeros_like(ids)
        for row, one in enumerate(deal.maps):
            mine = one.indices(deal.rank, ids.device)
            here = slice(deal.width - len(mine), None)
            ids[row, here] = input_ids[row, mask[row].bool().nonzero().flatten()[mine]]
            positions[row, here] = seen[row] + mine
        return {"input_ids": ids, "position_ids": positions}

    # ---- what generate asks --------------------------------------------------------------------------------------

    @torch.compiler.disable
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen (columns of the batch), not slots held."""
        return self.compressed.num_seen_columns

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the mask over everything seen."""
        return self.compressed.num_seen_columns + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self.compressed.select_rows(indices)
        if self._shape is not None:
            self._shape["batch size"] = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        rows = torch.arange(len(self.compressed.num_seen)).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def reset(self) -> None:
        """Forget everything but the configuration."""
        self.compressed.reset()
        self._modules.clear()
        self._pending = self._shape = None
        self._longest = 0

    def ended_rows(self, eos_token_id: int | Sequence[int], pad_token_id: int) -> EndedRows:
        """For `generate(..., stopping_criteria=[cache.ended_rows(eos, pad)])` of a batch that goes on to a next turn.

        `generate` feeds padding to rows that have ended, and says that it is tokens. So told, the cache leaves it out,
        and the mask of the next turn, with zeros there, agrees with what the cache has seen. It stops nothing. Make one
        for each call.

        Args:
            eos_token_id, pad_token_id: those that `generate` uses: of `model.generation_config`, or of the call.
        """
        return EndedRows(self.compressed, eos_token_id, pad_token_id)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: evicted tokens cannot be brought back."""
        raise ValueError("a D2OCache cannot be cropped: evicted tokens are gone. Assisted decoding needs another cache")

    def activate_past_recording(self) -> None:
        """Refused: assisted and speculative decoding take tokens back, which a compressed cache cannot."""
        raise ValueError(
            "assisted (speculative, prompt-lookup) decoding takes tokens back, and a D2OCache cannot: evicted tokens "
            "are gone. Use greedy decoding, sampling or beam search"
        )

    @property
    def max_cache_len(self) -> int:
        """Refused: only peft asks for it, to put the keys of a prefix in the place of this cache."""
        raise ValueError(
            "prefix tuning (peft) brings a cache of its own, with the keys of its prefix, and a D2OCache cannot hold "
            "those: use adapters that change weights, such as LoRA, or leave past_key_values out"
        )

    @property
    def is_croppable(self) -> bool:
        """False: nothing can be taken back."""
        return False

    # ---- what users ask ------------------------------------------------------------------------------------------

    def finalize(self) -> None:
        """Compress now. `generate` does so before the first decode step; call it to reuse a compressed prompt."""
        with without_autocast():
            self.compressed.finalize()

    def report(self) -> CacheReport:
        """What was asked for, what is held, layer by layer; `print(cache.report())` is a table."""
        return make_report(self.compressed)
