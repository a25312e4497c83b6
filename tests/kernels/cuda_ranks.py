"""A request on ranks whose caches evict by CUDA C++, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.kernels.backend import set_backend
from d2o_dist.kernels.cuda import evict
from d2o_dist.kernels.cuda.library import Host, host_build
from tests.sharded.play import Play, on_rank


def on_rank_in_cuda(
    rank: int, world: int, one: Play, parallel: ParallelConfig, library: Path
) -> tuple[dict[str, Any], int]:
    """`on_rank`, and how many evictions it did in two launches."""
    torch.set_num_threads(1)
    original, calls = evict.cuda_evict_over_ranks, []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    evict.cuda_evict_over_ranks = counted
    try:
        with host_build(Host(library)):
            set_backend("cuda")
            return on_rank(rank, world, one, parallel)[0], len(calls)
    finally:
        evict.cuda_evict_over_ranks = original
        set_backend("auto")
