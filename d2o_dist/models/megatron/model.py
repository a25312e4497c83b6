"""A Megatron `GPTModel` behind the seam.

Shape legend: B rows, n columns of a forward, V vocabulary, R dimensions of a head that are turned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.models.base import ModelAdapter
from d2o_dist.models.cache import ModelCache
from d2o_dist.models.megatron.attention import CacheForward
from d2o_dist.models.shape import ModelShape
from d2o_dist.policy.config import D2OConfig

_EMBEDDINGS = ("rope", "yarn", "learned_absolute", "none")


class MegatronModel(ModelAdapter):
    """A `GPTModel` in evaluation mode, whose layers come from `with_cache(spec)`.

    Args:
        model: the model, or what wraps it (`Float16Module`, `DistributedDataParallel`).
        vocab_size: ids that are tokens; those that Megatron added to divide the vocabulary are never chosen.

    Raises:
        ValueError: pipeline stages; a model with attention that a cache cannot serve, or of another spec.
    """

    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        while hasattr(model, "module"):
            model = model.module
        self.model = model
        self._cores = _check(model)
        config, tp = model.config, parallel_state.get_tensor_model_parallel_world_size()
        self.shape = ModelShape(
            windows=tuple(_window(config, core) for core in self._cores),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_query_groups,
            head_dim=config.kv_channels,
            kv_replicas=max(1, tp // config.num_query_groups),
            vocab_size=model.vocab_size if vocab_size is None else vocab_size,
            max_positions=model.max_sequence_length,
        )
        self._frequencies = _frequencies(model, self.device)

    @property
    def device(self) -> torch.device:
        """See `ModelAdapter`."""
        return self.model.embedding.word_embeddings.weight.device

    def make_cache(
        self,
        d2o: D2OConfig,
        mesh: ParallelMesh | None = None,
        parallel: ParallelConfig | None = None,
        counter: TrafficCounter | None = None,
    ) -> ModelCache:
        """See `ModelAdapter`; the mesh is that of the model: `comm.adapters.from_megatron(parallel_state)`.

        Raises:
            ValueError: it has other sizes.
        """
        tp = parallel_state.get_tensor_model_parallel_world_size()
        cp = parallel_state.get_context_parallel_world_size()
        found = (1, 1) if mesh is None else (mesh.tp, mesh.sp)
        if found != (tp, cp):
            raise ValueError(
                f"tp ({found[0]}) and sp ({found[1]}) of the mesh must be tensor_model_parallel_size ({tp}) and "
                f"context_parallel_size ({cp}): take the mesh of from_megatron(parallel_state)"
            )
        return ModelCache(self.shape, d2o, mesh, parallel, counter)

    @torch.no_grad()
    def forward(
        self, ids: Tensor, positions: Tensor | None, cache: Any, mask: Tensor | None = None, *,
        all_logits: bool = False, tiles: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """See `ModelAdapter`. Positions are those given, row by row, where Megatron would count columns."""
        assert tiles is None
        model = self.model
        if positions is None:
            seen = torch.tensor(cache.compressed.num_seen or [0] * len(ids), device=ids.device)
            positions = seen[:, None] + torch.arange(ids.shape[1], device=ids.device)
        turned = None
        if self._frequencies is not None:
            turned = positions.T[:, :, None, None].float() * self._frequencies
        with self._running(CacheForward(cache, mask, positions)):
            hidden = model.embedding(input_ids=ids, position_ids=positions)
            hidden = model.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=turned)
        tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        hidden = hidden if all_logits else hidden[-1:]
        logits, _ = model.output_layer(hidden, weight=tied, runtime_gather_output=True)
        logits = logits.transpose(0, 1)[..., : self.shape.vocab_size]
        return logits if all_logits else logits[:, -1]

    @contextmanager
    def _running(self, forward: CacheForward) -> Iterator[None]:
        for core in self._cores:
            core.running = forward
        try:
            yield
        finally:
            for core in self._cores:
                core.running = None


def _check(model: Any) -> list[Any]:
    """The core attention of each layer; see `MegatronModel`."""
    config, stages = model.config, parallel_state.get_pipeline_model_parallel_world_size()
    if stages > 1:
        raise ValueError(
            f"pipeline_model_parallel_size ({stages}) must be 1: a request is spread over tensor and context ranks, "
            f"not over stages of the {config.num_layers} layers"
        )
    if config.sequence_parallel:
        raise ValueError("sequence_parallel (True) must be False: a decoded token cannot be cut over tensor ranks")
    if model.position_embedding_type not in _EMBEDDINGS:
        raise ValueError(f"position_embedding_type ({model.position_embedding_type}) must be one of {_EMBEDDINGS}")
    for name, plain in (("softmax_type", "vanilla"), ("use_mup", False)):
        if getattr(config, name, plain) != plain:
            raise ValueError(f"{name} ({getattr(config, name)}) must be {plain}: nothing else is served from a cache")
    cores = [getattr(getattr(layer, "self_attention", None), "core_attention", None) for layer in model.decoder.layers]
    for index, core in enumerate(cores):
        if not hasattr(core, "running"):
            raise ValueError(f"layer {index} has {type(core).__name__}: make the model from with_cache(spec)")
        if not core.is_causal:
            raise ValueError(f"layer {index} is not causal: a cache attends causally")
    return cores


def _window(config: Any, core: Any) -> int | None:
    """Keys that a query of the layer sees, itself included; None: all before it."""
    skip = getattr(config, "window_attn_skip_freq", None)
    if not is_layer_window_attention(config.window_size, skip, core.layer + 1) or config.window_size[0] < 0:
        return None
    return config.window_size[0] + 1


def _frequencies(model: Any, device: torch.device) -> Tensor | None:
    """[R] float32: by how much each dimension of a head is turned a position; None for models that turn nothing."""
    rotary = getattr(model, "rotary_pos_emb", None)
    if rotary is None:
        return None
    # Megatron moves its frequencies to the GPU of this rank, without asking whether there is one.
    on_cpu = patch.object(torch.cuda, "current_device", lambda: device) if device.type == "cpu" else nullcontext()
    with on_cpu:
        # The angles of positions 0 and 1, of all ranks: context ranks would otherwise get a part.
        angles = rotary(2, packed_seq=True)
    return (angles[0] if isinstance(angles, tuple) else angles)[1, 0, 0].to(device)
