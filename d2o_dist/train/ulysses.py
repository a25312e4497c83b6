"""Ulysses with gradients: token shards of all heads become all tokens of some heads, and back.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n tokens of a shard, T = n * sp tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2o_dist.comm import Collectives


class _AllToAll(torch.autograd.Function):
    """`Collectives.all_to_all` whose backward sends the gradients back the way the values came."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, comm: Collectives, split_dim: int, concat_dim: int) -> Tensor:
        ctx.comm, ctx.dims = comm, (split_dim, concat_dim)
        return comm.all_to_all(tensor, split_dim, concat_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        split_dim, concat_dim = ctx.dims
        return ctx.comm.all_to_all(grad, concat_dim, split_dim), None, None, None


def check_heads(num_heads: int, num_kv_heads: int, sp: int, *, compressed: bool) -> None:
    """Refuse heads that cannot be dealt to `sp` ranks.

    Args:
        compressed: whether prompts are compressed: then each rank needs whole groups of query heads.

    Raises:
        ValueError: names the heads and sp.
    """
    if num_heads % sp:
        raise ValueError(f"num_attention_heads ({num_heads}) must be divisible by sp ({sp})")
    if num_kv_heads % sp and (compressed or sp % num_kv_heads):
        also = "" if compressed else ", or sp by them"
        raise ValueError(f"num_key_value_heads ({num_kv_heads}) must be divisible by sp ({sp}){also}")


class GradientExchange:
    """Moves a layer's queries, keys and values between the two ways to share them. Nothing is sent at size 1.

    Args:
        comm: over the ranks that share the tokens, which lie in rank order and in equal shards.
        tensor: over the ranks that share the heads of a model, in their order; None: all heads are here.
    """

    def __init__(self, comm: Collectives, tensor: Collectives | None = None) -> None:
        self.comm, self.tensor = comm, tensor

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, Hq, n, D], k and v [B, Hkv, n, D] -> all T tokens of Hq / sp and Hkv / sp heads, in one exchange.

        With fewer KV heads than ranks, the ranks of a group of query heads get a copy of its KV head each, and the
        gradients of the copies are added.
        """
        size = self.comm.size
        if size == 1:
            return q, k, v
        check_heads(q.shape[1], k.shape[1], size, compressed=False)
        if k.shape[1] % size:
            k, v = (tensor.repeat_interleave(size // tensor.shape[1], 1) for tensor in (k, v))
        parts = zip(*(tensor.chunk(size, 1) for tensor in (q, k, v)), strict=True)
        packed = torch.cat([tensor for rank in parts for tensor in rank], 1)
        arrived = _AllToAll.apply(packed, self.comm, 1, 2)
        return arrived.split([q.shape[1] // size, k.shape[1] // size, v.shape[1] // size], 1)

    def to_tokens(self, out: Tensor) -> Tensor:
        """[B, Hq / sp, T, D] -> this rank's tokens of all heads, [B, Hq, n, D]."""
        return out if self.comm.size == 1 else _AllToAll.apply(out, self.comm, 2, 1)

    def gather_heads(self, reports: Tensor) -> Tensor:
        """[B, h, X] of the heads at hand -> [B, H, X] of all, in the order of the heads; without gradients."""
        found = self.comm.all_gather(reports, 1)
        return found if self.tensor is None else self.tensor.all_gather(found, 1)
