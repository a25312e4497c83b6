"""`D2OCache`: a compressed cache in the shape that Hugging Face models and `generate` know.

Shape legend: B rows, Hkv key/value heads, n tokens of a chunk, D head dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.core.softmax import Softmax
from d2o_dist.models.hf.attention import CACHE_TAG
from d2o_dist.models.hf.copies import CopiedCache
from d2o_dist.models.hf.ended import EndedRows
from d2o_dist.models.hf.forward import run_model
from d2o_dist.models.hf.guards import attending, check_attention, sharers, state_counts, text_config
from d2o_dist.models.hf.masks import Width
from d2o_dist.models.hf.rope import is_let_go_of
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.models.hf.stateful import StatefulCache
from d2o_dist.models.hf.supported import check_supported, resumes
from d2o_dist.models.hf.temperature import Nowhere, tuned, tuned_layers
from d2o_dist.models.layer import LayerView
from d2o_dist.policy.config import D2OConfig


class D2OLayer(LayerView, CacheLayerMixin):
    """A `LayerView` under the names that transformers asks a layer of a cache for."""

    is_compileable = False
    is_croppable = False

    @property
    def is_initialized(self) -> bool:
        """Whether a token was seen."""
        return self.shape is not None

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


class D2OCache(CopiedCache, StatefulCache, Cache):
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
        reading: `whole`, or `layerwise` for prompts that are read in one forward; see `ModelCache`.

    Raises:
        ValueError: a model whose attention is not or cannot be `d2o`, that is not supported or has no layer to be
            compressed, a budget that this model's layers cannot have, or heads that the ranks cannot share.
    """

    view_class = D2OLayer

    def __init__(
        self,
        config: Any,
        d2o: D2OConfig | None = None,
        mesh: ParallelMesh | None = None,
        parallel: ParallelConfig | None = None,
        counter: TrafficCounter | None = None,
        *,
        reading: str = "whole",
    ) -> None:
        check_supported(config)
        self.model_config = text_config(config)
        check_attention(self.model_config)
        StatefulCache.__init__(
            self, state_counts(self.model_config), shape_of(config), d2o, mesh, parallel, counter, reading=reading,
            resumes=resumes(self.model_config),
        )  # fmt: skip
        attends = attending(self.model_config)
        # What the model calls a layer -> its number among those that attend.
        self._numbers = {index: number for number, index in enumerate(attends)}
        # Those that attend to keys of others, numbered on: they do not call `update`.
        self._sharers = {index: number for number, index in enumerate(sharers(self.model_config), len(attends))}
        views = dict(zip(attends, self.layers, strict=True))
        Cache.__init__(self, layers=[views.get(index, other) for index, other in enumerate(self.states.layers)])
        self._tuned = tuned_layers(self.model_config)
        self._is_true = not is_let_go_of(config)
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        self._pending: int | None = None
        # Of latent attention, what was announced: [B, 1, n, D], the latent and the rotated part of the key.
        self.latents: Tensor | None = None
        self._is_checked = False
        self._filled_with: dict[str, Any] | None = None
        # (Hkv, D) of layers that hold something, as far as they were asked.
        self._held: dict[int, tuple[int, int]] = {}

    def __bool__(self) -> bool:
        """False for models whose `generate` asks `if past_key_values` only to let go of the cache; True for others."""
        return self._is_true

    # ---- called by the model -------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announce a layer's new keys and values; the attention function stores them, once it knows the padding.

        Of latent attention they are the latent and the rotated part of the key, which the model then expands.

        Raises:
            ValueError: attention is not `d2o`, or the model is not the one this cache was filled by.
        """
        if self._numbers.get(layer_idx) == 0:  # the configuration is slow to ask
            check_attention(self.model_config)
        if self._pending is not None:
            raise ValueError(
                f"the keys of layer {self._pending} never reached d2o attention: the model was not loaded with "
                'attn_implementation="d2o", or its attention does not use the attention interface. Make a new cache'
            )
        if layer_idx not in self._numbers:
            raise ValueError(
                f"layer {layer_idx} brings keys, but the cache was made for {len(self.layers)} layers, of which "
                f"{len(self._numbers)} have attention"
            )
        # A graph of torch.compile would be made anew whenever what is held has another shape: asked outside of it.
        self._is_checked, latent = not torch.compiler.is_compiling(), self.shape.latent
        if latent is not None:
            if (key_states.shape[1], key_states.shape[3]) != (1, latent):
                raise ValueError(
                    f"layer {layer_idx} brings {key_states.shape[1]} keys of {key_states.shape[3]}, not one latent of "
                    f"{latent} (kv_lora_rank): a D2OCache serves latent attention that caches latents"
                )
            self.latents = torch.cat([key_states, value_states], -1)
        if self._is_checked:
            self._check_shape(key_states if latent is None else self.latents, layer_idx)
            if latent is not None and self._numbers[layer_idx] == 0 and not self.compressed.in_forward:
                self.check_begun()
        self._pending = self._numbers[layer_idx]
        if latent is not None:  # no tag outlives what the model makes of them: the mask leads to this cache
            return key_states, value_states
        # An alias, so that the tag is not left on the model's own tensor.
        tagged = key_states.view_as(key_states)
        setattr(tagged, CACHE_TAG, self)
        return tagged, value_states

    @property
    def pending_window(self) -> int | None:
        """The window of the layer whose keys were announced; None: full attention, or no such layer."""
        return None if self._pending is None else self.compressed.windows[self.compressed.order.owner(self._pending)]

    def check_pending(self, keys: Tensor, module: nn.Module) -> None:
        """Called by d2o attention with keys of this cache: as `update`, if it could not ask, or was not called for a
        module that attends to keys of another."""
        if self._pending is None:
            self._pending = self._sharers.get(getattr(module, "layer_idx", None))
        elif not self._is_checked:
            layer_idx = next(index for index, number in self._numbers.items() if number == self._pending)
            self._check_shape(keys, layer_idx)

    def check_batch(self, batch: int) -> None:
        """See `StatefulCache`."""
        self._check_filled({"batch size": batch})

    def _check_filled(self, now: dict[str, Any]) -> None:
        before = self._filled_with or {}
        for name in now.keys() & before.keys():
            if now[name] == before[name]:
                continue
            raise ValueError(
                f"the cache was filled with {name} {before[name]} and is now used with {now[name]}: the model or "
                "the batch changed, or layers lie on several devices (device_map), which a D2OCache cannot serve. "
                "Make a new cache (or select rows with batch_select_indices)"
            )

    def _check_shape(self, keys: Tensor, layer_idx: int) -> None:
        batch, heads, _, dim = keys.shape
        batch -= self.step_padding if self.compressed.step_announced else 0
        now = {"batch size": batch, "dtype": keys.dtype, "device": keys.device}
        if now != self._filled_with:
            self._check_filled(now)
            self._filled_with = now
        held = self._held.get(layer_idx)
        if held is None:
            held = self.layers[layer_idx].shape
            if held is None or self.ranks.deals_tokens:
                return
            self._held[layer_idx] = held
        if held != (heads, dim):
            raise ValueError(
                f"layer {layer_idx} has {heads} KV heads of dim {dim}, but the cache holds {held[0]} of dim {held[1]}: "
                "the model changed. Make a new cache"
            )

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, mask: Tensor | None,
        positions: Tensor | None = None, blocks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Called by d2o attention: store the announced keys and values, and attend: [B, Hq, n, D].

        Args:
            mask: 2D, of all columns; positions: the position ids of the new ones. None says nothing.
            blocks: see `CompressedCache.attend`.
        """
        layer, self._pending, self.latents = self._pending, None, None
        if layer is None:
            raise ValueError("d2o attention met keys of this cache that were not announced by update()")
        if layer == 0 and self.states and self.shape.latent is None:
            self.check_begun()
        known = self._modules.setdefault(layer, weakref.ref(module))
        if known() is not module:
            raise ValueError(f"layer {layer} of another model uses this cache; it belongs to the model that filled it")
        tune = partial(tuned, module) if getattr(module, "layer_idx", None) in self._tuned else None
        return self.attend_layer(layer, query, key, value, softmax, mask, positions, blocks, tune)

    def abandon_step(self) -> None:
        """Take back an announced step whose forward was recorded, not run, and broken off."""
        self._pending = self.latents = None
        super().abandon_step()

    # ---- called by whoever runs the model ------------------------------------------------------------------------

    def deal(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """This rank's part of a chunk of prompt, as arguments of the model's forward; see `deal_tokens`."""
        return dict(zip(("input_ids", "position_ids"), self.deal_tokens(input_ids, attention_mask), strict=True))

    def reread(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, chunk: int | None = None
    ) -> None:
        """Read the prompts a second time, by the model that has read them; see `read_again`."""
        self.read_again(partial(run_model, model), input_ids, attention_mask, chunk=chunk)

    # ---- what generate asks --------------------------------------------------------------------------------------

    @torch.compiler.disable
    def get_seq_length(self, layer_idx: int | None = None) -> int | Nowhere:
        """Tokens seen (columns of the batch), not slots held. Layers that would tune their queries by it are told
        nothing: see `attend`."""
        return Nowhere() if layer_idx in self._tuned else self.compressed.num_seen_columns

    @torch.compiler.disable
    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Tokens seen (columns of the batch): masks derive from it."""
        return self.compressed.num_seen_columns

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the mask over everything seen."""
        width = Width(self.compressed.num_seen_columns + query_length)
        width.cache = self
        return width, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self.select_rows(indices)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows, in that order, repeated where repeated."""
        super().select_rows(rows)
        if self._filled_with is not None:
            self._filled_with["batch size"] = len(rows)

    def join(self, *others: D2OCache) -> None:
        """Take in the rows of other caches of the same model, which must not be used afterwards."""
        super().join(*others)
        if self._filled_with is not None:
            self._filled_with["batch size"] = len(self.compressed.num_seen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        rows = torch.arange(len(self.compressed.num_seen)).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def reset(self) -> None:
        """Forget everything but the configuration."""
        super().reset()
        self._modules.clear()
        self._held.clear()
        self._pending = self.latents = self._filled_with = None

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
