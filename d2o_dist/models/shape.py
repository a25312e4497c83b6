"""What is known of a model without its weights."""

from __future__ import annotations

from dataclasses import dataclass

from d2o_dist.cache.order import Order
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.request import RequestRanks
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.slots.windows import Window

# How Hugging Face configurations call the border; messages say it, whatever library the model is from.
BORDER = "original_max_position_embeddings"


@dataclass(frozen=True)
class ModelShape:
    """What of a model the cache, the engine and the ranks need to know.

    Attributes:
        windows: per layer with attention None (full attention) or its window. Other layers are not counted.
        looks: of each layer that has no keys of its own, in order, the layer whose keys it attends to; cuts_prompts:
            whether these get the columns of a prompt alone whose logits are asked for.
        num_heads, num_kv_heads: query heads and KV heads of a layer of the whole model; head_dim: of each key, the
            largest.
        other_heads: the same two of layers with windows that have others.
        latent: elements of a key, the first ones, that are its value too (latent attention, whose one KV head is the
            latent and the rotated part of the key); None: values are stored apart.
        kv_replicas: tensor ranks that hold a copy of each KV head, where there are fewer heads than ranks.
        vocab_size: ids it has embeddings for; max_positions: tokens it has positions for. None: not known.
        border: tokens beyond which it turns a whole text otherwise (`longrope`); None: none.
        has_dynamic_rope: whether its rotary embedding is computed anew as the text grows.
        has_states: whether some layers keep a state of the whole text (linear attention, Mamba, convolutions).
        source: folder or hub name that it was loaded from, and revision: the hub's commit; None: not known.
    """

    windows: tuple[Window | None, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent: int | None = None
    kv_replicas: int = 1
    vocab_size: int | None = None
    max_positions: int | None = None
    border: int | None = None
    has_dynamic_rope: bool = False
    has_states: bool = False
    other_heads: tuple[tuple[int, int], ...] = ()
    looks: tuple[int, ...] = ()
    cuts_prompts: bool = False
    source: str | None = None
    revision: str | None = None

    @property
    def order(self) -> Order:
        """In which its layers attend."""
        return Order(len(self.windows), self.looks, reads_prompts=not self.cuts_prompts)

    def kv_heads_of_rank(self, tp: int) -> int:
        """KV heads of each of `tp` tensor ranks, copies included.

        Raises:
            ValueError: the heads cannot be dealt evenly, or there are fewer than ranks and they were not copied.
        """
        for heads, kv_heads in ((self.num_heads, self.num_kv_heads), *self.other_heads):
            if heads % tp:
                raise ValueError(f"num_attention_heads ({heads}) must be divisible by tp ({tp})")
            if kv_heads * self.kv_replicas % tp:
                raise ValueError(
                    f"num_key_value_heads ({kv_heads}, {self.kv_replicas} copies of each) must be divisible by tp "
                    f"({tp})"
                )
        return self.num_kv_heads * self.kv_replicas // tp

    def check_sequence_ranks(self, sp: int) -> None:
        """Refuse ranks that would share a text whose every token some layers must read in order, or heads of layers
        with windows that cannot be dealt as those of the others are.

        Raises:
            ValueError: more than one of them.
        """
        for _, kv_heads in self.other_heads:
            if sp > 1 and kv_heads % self.num_kv_heads:
                raise ValueError(
                    f"sp ({sp}) cannot share a text to this model: its layers with windows have {kv_heads} KV heads, "
                    f"which is no multiple of the {self.num_kv_heads} of the others. Use tp or dp"
                )
        if self.has_states and sp > 1:
            raise ValueError(
                f"sp ({sp}) cannot share a text to this model: its layers of linear attention, Mamba or convolution "
                "read all of it in order. Use tp or dp"
            )
        if self.looks and sp > 1:
            raise ValueError(
                f"sp ({sp}) cannot share a text to this model: {len(self.looks)} of its layers attend to the keys and "
                "values of others. Use tp or dp"
            )

    def request_ranks(
        self, mesh: ParallelMesh | None, parallel: ParallelConfig | None, counter: TrafficCounter | None
    ) -> RequestRanks:
        """The ranks that share a request to this model.

        Args:
            mesh: None: this process alone; parallel: None: as `ParallelConfig` has it, with the sizes of the mesh.

        Raises:
            ValueError: `parallel` of another mesh, or heads, or a text, that the ranks cannot share.
        """
        mesh = ParallelMesh.local() if mesh is None else mesh
        self.check_sequence_ranks(mesh.sp)
        parallel = ParallelConfig(tp=mesh.tp, sp=mesh.sp) if parallel is None else parallel
        return RequestRanks(mesh, parallel, self.kv_heads_of_rank(mesh.tp), self.kv_replicas, counter)


def check_side(border: int | None, seen: int, length: int) -> None:
    """Refuse a forward on the other side of the border than what was seen.

    Args:
        seen: tokens of the longest text seen; length: that text with the forward's tokens.

    Raises:
        ValueError: names both, and the border.
    """
    if border is not None and 0 < seen <= border < length:
        raise ValueError(
            f"the text would grow from {seen} to {length} tokens, beyond {BORDER} ({border}), where this model's "
            "longrope turns all tokens otherwise, also those that were read. Stay below it, or read a text that is "
            "longer from the start, in one piece and into a new cache"
        )
