"""`ParallelConfig`: how one request is spread over ranks, and how many replicas work side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from d2o_dist.fields.checks import check_bool, check_int, check_timeout
from d2o_dist.fields.io import check_choice
from d2o_dist.policy.config import D2OConfig

TP_ENGINES = ("deepspeed", "transformers")
SP_PREFILLS = ("auto", "ulysses", "allgather", "ring")
CACHE_LAYOUTS = ("auto", "heads", "sequence")
MERGE_SCOPES = ("global", "local")


@dataclass(frozen=True)
class ParallelConfig:
    """Ranks and what they share. The defaults are one process.

    Attributes:
        tp: ranks that share the heads of every layer.
        sp: ranks that share the tokens of a request.
        dp: replicas that work on different requests; null: as many as the started ranks allow.
        tp_engine: who shards the weights: `deepspeed` (AutoTP) or `transformers` (its own plan).
        sp_prefill: how a prompt that is spread over `sp` ranks attends: `ulysses` (all-to-all to head shards),
            `allgather` (keys and values gathered head by head), `ring` (they travel around), or `auto`: `ulysses` where
            every rank gets a KV head, else `allgather`, or `ring` for prompts of which one gathered head is over 1 GiB.
        cache_layout: what a rank holds while decoding: `heads` (some KV heads, all their slots; needs `ulysses`),
            `sequence` (a part of the slots of every head), or `auto`: `heads` after `ulysses`, else `sequence`.
        merge_scope: `global`: an evicted token is merged into the nearest kept one on any rank, as on one device;
            `local`: on its own rank only, which moves no keys. Only for `cache_layout: sequence`.
        check_replicas: compare checksums of positions and thresholds between ranks at every eviction, and stop,
            naming layer and rank, if they differ. For debugging: it costs a collective an eviction, or a token where
            heads have budgets of their own.
        timeout: seconds that a rank waits for another: in a collective, at the start, or, once it has nothing left to
            do, for another replica to decode a token or finish a batch. Then the job ends. A prompt's prefill must
            take less.
    """

    tp: int = 1
    sp: int = 1
    dp: int | None = None
    tp_engine: str = "deepspeed"
    sp_prefill: str = "auto"
    cache_layout: str = "auto"
    merge_scope: str = "global"
    check_replicas: bool = False
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        check_int("tp", self.tp, low=1)
        check_int("sp", self.sp, low=1)
        if self.dp is not None:
            check_int("dp", self.dp, low=1)
        check_choice("tp_engine", self.tp_engine, TP_ENGINES)
        check_choice("sp_prefill", self.sp_prefill, SP_PREFILLS)
        check_choice("cache_layout", self.cache_layout, CACHE_LAYOUTS)
        check_choice("merge_scope", self.merge_scope, MERGE_SCOPES)
        check_bool("check_replicas", self.check_replicas)
        check_timeout(self.timeout)
        if self.cache_layout == "heads" and self.sp_prefill in ("allgather", "ring"):
            raise ValueError(
                f'cache_layout ("heads") needs sp_prefill "ulysses", not "{self.sp_prefill}": other schemes leave '
                "every rank with tokens of all heads"
            )
        if self.merge_scope == "local" and self.cache_layout == "heads":
            raise ValueError('merge_scope ("local") needs cache_layout "sequence": in "heads" all merges are local')

    def replicas(self, world_size: int) -> int:
        """`dp`, given or derived from the number of ranks.

        Raises:
            ValueError: the ranks are not dp x sp x tp.
        """
        shards = self.sp * self.tp
        if self.dp is not None:
            if self.dp * shards != world_size:
                raise ValueError(
                    f"world size ({world_size}) must equal dp ({self.dp}) x sp ({self.sp}) x tp ({self.tp}) = "
                    f"{self.dp * shards}"
                )
            return self.dp
        if world_size % shards:
            raise ValueError(
                f"world size ({world_size}) must be a multiple of sp ({self.sp}) x tp ({self.tp}) = {shards}"
            )
        return world_size // shards

    def resolve(self, num_kv_heads: int) -> ParallelConfig:
        """The same with `auto` settled for a model that has `num_kv_heads` KV heads on each tensor rank.

        Raises:
            ValueError: `ulysses` with fewer KV heads than sequence ranks.
        """
        if self.sp == 1:
            return dataclasses.replace(self, sp_prefill="ulysses", cache_layout="heads", merge_scope="global")
        prefill = self.sp_prefill
        if prefill == "auto":
            fits = num_kv_heads >= self.sp and not (self.merge_scope == "local" and self.cache_layout == "auto")
            prefill = "ulysses" if fits else "allgather"
        if prefill == "ulysses" and num_kv_heads < self.sp:
            raise ValueError(
                f"sp_prefill (ulysses) gives every rank a KV head, but a tensor rank has {num_kv_heads} and sp is "
                f"{self.sp}: use allgather or ring"
            )
        layout = self.cache_layout
        if layout == "auto":
            layout = "heads" if prefill == "ulysses" and self.merge_scope == "global" else "sequence"
        if layout == "heads" and prefill != "ulysses":
            raise ValueError(
                f"cache_layout (heads) gives every rank a KV head, but a tensor rank has {num_kv_heads} and sp is "
                f"{self.sp}: use sequence"
            )
        return dataclasses.replace(self, sp_prefill=prefill, cache_layout=layout)

    def check_rules(self, d2o: D2OConfig) -> None:
        """Refuse rules that this way of sharing a request cannot follow; to be asked once `auto` is settled.

        Raises:
            ValueError: a second reading or budgets of heads, and slots of a head on several ranks.
        """
        if self.sp > 1 and self.cache_layout == "sequence" and (d2o.needs_reread or d2o.budget.per_head):
            raise ValueError(
                f"score.rule reread and budget.per_head (given are {d2o.score.name} and {d2o.budget.per_head}) need "
                f"all slots of a KV head on one rank, but with sp ({self.sp}) and sp_prefill ({self.sp_prefill}) "
                "cache_layout is sequence. Use tp, or sp_prefill ulysses and cache_layout heads (every rank must then "
                "get a KV head)"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return dataclasses.asdict(self)
