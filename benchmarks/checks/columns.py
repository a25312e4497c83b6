"""What checks of kernels that reduce columns read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.checks.common import normal


@dataclass(frozen=True, kw_only=True)
class ColumnCase:
    """num_ahead: keys after the last query (or before, if negative). dead: rows without lse, keys of bias -inf, NaN."""

    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    num_queries: int = 70
    q_start: int = 0
    num_ahead: int = 0
    bias: bool = False
    causal: bool = True
    dead: bool = False
    transposed: bool = False

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [2, Hq, n, D], k [2, Hkv, N, D], lse [2, Hq, n] and bias [2, Hkv, N] or None; statistics are float32."""
        num_heads, num_kv_heads = self.heads
        num_keys = max(1, self.q_start + self.num_queries + self.num_ahead)
        q = normal(2, num_heads, self.num_queries, self.head_dim, dtype=dtype, device=device)
        k = normal(2, num_kv_heads, num_keys, self.head_dim, dtype=dtype, device=device, seed=1)
        lse = normal(2, num_heads, self.num_queries, dtype=torch.float32, device=device, seed=2).abs() + 6
        bias = None
        if self.bias or self.dead:
            bias = normal(2, num_kv_heads, num_keys, dtype=torch.float32, device=device, seed=3)
        if self.dead:
            lse[:, :, ::4], lse[:, :, 1::4] = torch.inf, -torch.inf
            q[:, :, ::4] = torch.nan
            bias[:, :, ::5] = -torch.inf
            k[:, :, ::5] = torch.nan
        if self.transposed:
            q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
            lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        return q, k, lse, bias
