"""Latent attention: what a module would make of the latents that a cache holds is put into its queries and its output.

Keys and values of all heads are linear in the latent c of a token: k_h = W_h c, v_h = V_h c; the rotated part of a key
is the same for all heads. So q_h . k_h = (W_h^T q_h) . c, and sum_j p_j v_hj = V_h (sum_j p_j c_j). Over latents it is
attention with one KV head, whose key is the latent and the rotated part, and whose value is the latent.

Shape legend: B rows, Hq query heads, n tokens, r elements of a latent, R of the rotated part, d of the rest of a key, D
of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Expansion:
    """What a module makes of a latent.

    Attributes:
        keys: [Hq, r, d]; values: [Hq, r, D].
        offset: [Hq, 1, D], added to values; None: nothing is. What is added to keys changes no softmax.
    """

    keys: Tensor
    values: Tensor
    offset: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, latent: Tensor, rotated: Tensor) -> Expansion:
        """Taken at each forward, so that it is never that of other weights; nothing is kept.

        Args:
            latent: [B, 1, n, r] and rotated: [B, 1, n, R], of which the dtypes, devices and last dims count.
        """
        known = cls.of_weight(module)
        return cls.asked(module, latent, rotated) if known is None else known

    @classmethod
    def of_weight(cls, module: nn.Module) -> Expansion | None:
        """Views of the weight, where it is a plain matrix and nothing but it is applied; None: it is not."""
        projection = module.kv_b_proj
        is_plain = type(projection) is nn.Linear and type(projection.weight) is nn.Parameter
        is_changed = projection._forward_hooks or projection._forward_pre_hooks or "forward" in vars(projection)
        if not is_plain or is_changed or projection.bias is not None:
            return None
        dims = [module.qk_nope_head_dim, module.v_head_dim]
        keys, values = projection.weight.unflatten(0, (-1, sum(dims))).mT.split(dims, -1)
        return cls(keys, values, None)

    @classmethod
    def asked(cls, module: nn.Module, latent: Tensor, rotated: Tensor) -> Expansion:
        """What the module makes of each unit vector: it knows quantised weights, adapters and shards."""
        size = latent.shape[-1]
        units = torch.eye(size + 1, size, dtype=latent.dtype, device=latent.device)  # the last one is 0
        keys, values = module.expand_kv(units[None, None], rotated.new_zeros(1, 1, size + 1, rotated.shape[-1]))
        keys, values = keys[0, ..., : keys.shape[-1] - rotated.shape[-1]], values[0]
        return cls(keys[:, :-1] - keys[:, -1:], values[:, :-1] - values[:, -1:], values[:, -1:])

    def absorbed(self, query: Tensor) -> Tensor:
        """[B, Hq, n, d + R] as the model has it -> [B, Hq, n, r + R], over latents."""
        plain, rotated = query.tensor_split([self.keys.shape[-1]], -1)
        return torch.cat([_times(plain, self.keys.mT), rotated], -1)

    def expanded(self, out: Tensor) -> Tensor:
        """[B, Hq, n, r], sums of latents -> [B, Hq, n, D], of values."""
        values = _times(out, self.values)
        return values if self.offset is None else values + self.offset.to(out.dtype)


def _times(vectors: Tensor, matrices: Tensor) -> Tensor:
    """[B, Hq, n, i] by the matrix [Hq, i, o] of each head: [B, Hq, n, o] in the dtype of the vectors.

    On a CPU row by row, so that a row gets the bits that it gets alone.
    """
    matrices = matrices.to(vectors.dtype)
    if vectors.device.type == "cpu":
        return torch.stack([row @ matrices for row in vectors])
    return torch.einsum("bhni,hio->bhno", vectors, matrices)
