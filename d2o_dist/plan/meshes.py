"""How a model lies on dp x sp x tp ranks, which of these meshes are legal, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from d2o_dist.comm.shard import Contiguous
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.layout.sequence import RING_FROM_BYTES
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.models.hf.tensor_parallel import check_engine, check_separate_projections, kv_replicas
from d2o_dist.plan.model_size import ModelSize
from d2o_dist.policy.config import D2OConfig


@dataclass(frozen=True)
class Share:
    """What of a request one rank holds: the one with most.

    Attributes:
        parallel: with `auto` settled.
        query_heads, kv_heads: of a tensor rank.
        copies: tensor ranks that hold the same KV heads.
        queries_here, kv_here: of these heads, those of a sequence rank where heads are dealt.
    """

    parallel: ParallelConfig
    query_heads: int
    kv_heads: int
    copies: int
    queries_here: int
    kv_here: int

    @property
    def tp(self) -> int:
        """Ranks that share the heads."""
        return self.parallel.tp

    @property
    def sp(self) -> int:
        """Ranks that share the tokens."""
        return self.parallel.sp

    @property
    def cuts_of_more(self) -> int:
        """Into how many parts embeddings and experts are cut: DeepSpeed's AutoTP leaves them whole on every rank."""
        return self.tp if self.parallel.tp_engine == "transformers" else 1

    @property
    def reads_by_heads(self) -> bool:
        """Whether a prompt's slots lie on this rank for all tokens of some heads, not some tokens of all."""
        return self.parallel.sp_prefill == "ulysses"

    @property
    def holds_by_heads(self) -> bool:
        """The same of the slots that are kept."""
        return self.parallel.cache_layout == "heads"


def share_of(model: ModelSize, d2o: D2OConfig, parallel: ParallelConfig) -> Share:
    """Who holds what. The checks are those of a run.

    Raises:
        ValueError: heads that the ranks cannot share, or rules that they cannot follow.
    """
    copies = 1
    shape_of(model.config).check_sequence_ranks(parallel.sp)
    if parallel.tp > 1:
        copies = kv_replicas(model.config, parallel.tp)
        check_separate_projections(model.config)
        check_engine(model.config, parallel.tp_engine)
    kv_heads = model.num_kv_heads * copies // parallel.tp
    settled = parallel.resolve(kv_heads)
    settled.check_rules(d2o)
    query_heads = model.num_heads // parallel.tp
    kv_here = max(Contiguous(kv_heads, parallel.sp).lengths())
    return Share(settled, query_heads, kv_heads, copies, query_heads // kv_heads * kv_here, kv_here)


def rings(share: Share, model: ModelSize, width: int, dtype: torch.dtype, *, is_auto: bool) -> Share:
    """The same, with `ring` where `auto` would find one gathered head of `width` tokens a rank too long."""
    gathered = share.sp * width * model.pair * dtype.itemsize
    if is_auto and share.parallel.sp_prefill == "allgather" and gathered > RING_FROM_BYTES:
        return replace(share, parallel=replace(share.parallel, sp_prefill="ring"))
    return share


def all_meshes(parallel: ParallelConfig, num_gpus: int) -> Iterator[ParallelConfig]:
    """Every dp x sp x tp of so many ranks, with the other fields of `parallel`; a tp or sp above 1 there stays."""
    for tp in (tp for tp in range(1, num_gpus + 1) if num_gpus % tp == 0):
        for sp in (sp for sp in range(1, num_gpus // tp + 1) if num_gpus // tp % sp == 0):
            dp = num_gpus // tp // sp
            asked = (parallel.tp in (1, tp)) and (parallel.sp in (1, sp)) and parallel.dp in (None, dp)
            if asked:
                yield replace(parallel, tp=tp, sp=sp, dp=dp)
