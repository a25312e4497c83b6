"""A Megatron `GPTModel` behind the seam.

Shape legend: B rows, n columns of a forward, V vocabulary, R dimensions of a head that are turned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch import Tensor

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import Axis, ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.models.base import ModelAdapter
from d2o_dist.models.cache import ModelCache
from d2o_dist.models.megatron.attention import CacheForward, Forward
from d2o_dist.models.megatron.ranks import check_sizes
from d2o_dist.models.megatron.tiles import in_tiles
from d2o_dist.models.shape import ModelShape
from d2o_dist.policy.config import D2OConfig

_EMBEDDINGS = ("rope", "yarn", "learned_absolute", "none")


class MegatronModel(ModelAdapter):
    """A `GPTModel` in evaluation mode, whose layers come from `with_cache(spec)`.

    Args:
        model: the model, or what wraps it (`Float16Module`, `DistributedDataParallel`).
        vocab_size: ids that are tokens; those that Megatron added to divide the vocabulary are never chosen.
        eos_ids: ids that it ends texts with.

    Raises:
        ValueError: pipeline stages; a model with attention that a cache cannot serve, or of another spec.
    """

    def __init__(self, model: Any, vocab_size: int | None = None, eos_ids: Iterable[int] = ()) -> None:
        while hasattr(model, "module"):
            model = model.module
        self.model = model
        self._cores = check_served(model)
        config, tp = model.config, parallel_state.get_tensor_model_parallel_world_size()
        self.shape = ModelShape(
            windows=tuple(core.window for core in self._cores),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_query_groups,
            head_dim=config.kv_channels,
            kv_replicas=max(1, tp // config.num_query_groups),
            vocab_size=model.vocab_size if vocab_size is None else vocab_size,
            max_positions=model.max_sequence_length,
        )
        self._eos_ids = frozenset(eos_ids)
        self._frequencies = frequencies(model, self.device)
        self._tp = tensor_ranks()

    @property
    def device(self) -> torch.device:
        """See `ModelAdapter`."""
        return self.model.embedding.word_embeddings.weight.device

    @property
    def tile_refusal(self) -> None:
        """See `ModelAdapter`."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """See `ModelAdapter`."""
        return self._eos_ids

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
        check_sizes(mesh)
        return ModelCache(self.shape, d2o, mesh, parallel, counter)

    @torch.no_grad()
    def forward(
        self, ids: Tensor, positions: Tensor | None, cache: Any, mask: Tensor | None = None, *,
        all_logits: bool = False, tiles: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """See `ModelAdapter`. Positions are those given, row by row, where Megatron would count columns."""
        model = self.model
        if positions is None:
            seen = torch.tensor(cache.compressed.num_seen or [0] * len(ids), device=ids.device)
            positions = seen[:, None] + torch.arange(ids.shape[1], device=ids.device)
        with nullcontext() if tiles is None else in_tiles(model, tiles):
            hidden = hidden_states(model, CacheForward(cache, mask, positions), ids, positions, self._frequencies)
        tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        hidden = hidden if all_logits else hidden[-1:]
        logits, _ = model.output_layer(hidden, weight=tied, runtime_gather_output=False)
        # Megatron gathers them into a tensor on a GPU, without asking whether there is one.
        logits = self._tp.all_gather(logits.contiguous(), -1).transpose(0, 1)[..., : self.shape.vocab_size]
        return logits if all_logits else logits[:, -1]


def hidden_states(
    model: Any, forward: Forward, ids: Tensor, positions: Tensor, turns: Tensor | None
) -> Tensor:
    """Those that the output layer takes, [n, B, H].

    Args:
        forward: how layers attend.
        ids, positions: [B, n] int64; turns: of `frequencies`.
    """
    turned = None if turns is None else positions.T[:, :, None, None].float() * turns
    cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
    for core in cores:
        core.running = forward
    try:
        hidden = model.embedding(input_ids=ids, position_ids=positions)
        return model.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=turned)
    finally:
        for core in cores:
            core.running = None


def tensor_ranks() -> Collectives:
    """Over Megatron's tensor group."""
    group = parallel_state.get_tensor_model_parallel_group()
    ranks = tuple(dist.get_process_group_ranks(group))
    return Collectives(Axis("tp", group.rank(), ranks, group if len(ranks) > 1 else None))


def check_served(model: Any) -> list[Any]:
    """The core attention of each layer.

    Raises:
        ValueError: see `MegatronModel`.
    """
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


def frequencies(model: Any, device: torch.device) -> Tensor | None:
    """[R] float32: by how much each dimension of a head is turned a position; None for models that turn nothing."""
    rotary = getattr(model, "rotary_pos_emb", None)
    if rotary is None:
        return None
    if isinstance(rotary, YarnRotaryEmbedding):
        # The angles of positions 0 and 1, of all ranks: context ranks would otherwise get a part.
        return rotary(2, packed_seq=True)[0][1, 0, 0].to(device)
    # Called, it would move its frequencies to a GPU, without asking whether there is one.
    angles = rotary.get_freqs_non_repeated(2)[1].to(device)
    return angles.repeat_interleave(2) if rotary.rotary_interleaved else torch.cat([angles, angles])
