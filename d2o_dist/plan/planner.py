"""All meshes of some GPUs for one model and one kind of request, with what each needs and how long it takes, ranked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.fields.checks import check_int
from d2o_dist.fields.io import check_choice
from d2o_dist.plan.gpus import Gpu
from d2o_dist.plan.memory import PromptMemory, prompt_memory
from d2o_dist.plan.meshes import Share, all_meshes, rings, share_of
from d2o_dist.plan.model_size import ModelSize
from d2o_dist.plan.seconds import Assumptions, Times, times_of
from d2o_dist.plan.traffic import PlannedTraffic, Sent
from d2o_dist.policy.config import D2OConfig

# What meshes are ranked by: seconds that a batch takes, or requests that all replicas answer in a second.
AIMS = ("latency", "throughput")
# Every divisor of their number is a mesh to calculate.
MAX_GPUS = 16384


@dataclass(frozen=True)
class Workload:
    """What is asked of the GPUs.

    Attributes:
        tokens: of each prompt; new_tokens: of each answer; batch: rows of a batch, on each replica.
        chunk: prompt tokens of one forward; None: all. reading: `whole` or `layerwise`.
        num_gpus, gpus_per_node: how many there are, and how many of them have the fast links.
    """

    model: ModelSize
    d2o: D2OConfig
    gpu: Gpu
    tokens: int
    new_tokens: int = 256
    batch: int = 1
    chunk: int | None = None
    reading: str = "whole"
    dtype: torch.dtype = torch.bfloat16
    num_gpus: int = 1
    gpus_per_node: int = 8
    assume: Assumptions = Assumptions()

    def __post_init__(self) -> None:
        for name in ("tokens", "new_tokens", "batch", "gpus_per_node"):
            check_int(name, getattr(self, name), low=1)
        check_int("num_gpus", self.num_gpus, low=1, high=MAX_GPUS)
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ValueError(
                f"num_gpus ({self.num_gpus}) must be a multiple of gpus_per_node ({self.gpus_per_node}): a launcher "
                "starts as many ranks on each node"
            )

    @property
    def room(self) -> float:
        """Bytes of a GPU that tensors can have."""
        return self.gpu.memory_gib * 2**30 * self.assume.usable


@dataclass(frozen=True)
class MeshPlan:
    """One mesh.

    Attributes:
        dp: replicas; share: of a request, on each rank.
        memory: of the rank with most; batch: the rows that it is of.
        most_rows: the largest batch that fits; 0: not even one row does.
        prompt, step: what a rank sends for a prompt, and for a token of each row with its part of an eviction.
        batch_s: seconds from the prompts to the last of their tokens.
    """

    dp: int
    share: Share
    memory: PromptMemory
    most_rows: int
    times: Times
    prompt: list[Sent]
    step: list[Sent]
    batch: int
    batch_s: float

    @property
    def fits(self) -> bool:
        """Whether the batch that was asked for does."""
        return self.most_rows >= self.batch

    @property
    def requests_per_s(self) -> float:
        """Of all replicas."""
        return self.dp * self.batch / self.batch_s

    @property
    def tokens_per_s(self) -> float:
        """That all replicas generate, once prompts are read."""
        return self.dp * self.batch / self.times.token


def plan_all(
    work: Workload, parallel: ParallelConfig, aim: str, check: Callable[[ParallelConfig], Any] = lambda mesh: None
) -> tuple[list[MeshPlan], list[tuple[ParallelConfig, str]]]:
    """Legal meshes, the best first and those that do not fit last; and the others with the reason why.

    Args:
        parallel: the fields that all meshes share; sizes above 1 in it are kept.
        aim: one of AIMS.
        check: raises ValueError for a mesh that the library of the model refuses.

    Raises:
        ValueError: `aim`, a budget that the model's layers cannot have, or sizes that so many GPUs do not have.
    """
    check_choice("aim", aim, AIMS)
    if not any(True for _ in all_meshes(parallel, work.num_gpus)):
        raise ValueError(f"no dp x sp x tp of {work.num_gpus} GPUs has dp {parallel.dp}, sp {parallel.sp} and tp "
                         f"{parallel.tp}, where dp null and sizes of 1 may be any")  # fmt: skip
    legal, refused = [], []
    for mesh in all_meshes(parallel, work.num_gpus):
        try:
            check(mesh)
            share = share_of(work.model, work.d2o, mesh)
        except ValueError as error:
            refused.append((mesh, str(error)))
        else:
            legal.append(plan_mesh(work, mesh, share))
    fastest = {"latency": lambda plan: plan.batch_s, "throughput": lambda plan: -plan.requests_per_s}[aim]
    return sorted(legal, key=lambda plan: (not plan.fits, fastest(plan))), refused


def plan_mesh(work: Workload, mesh: ParallelConfig, share: Share) -> MeshPlan:
    """One mesh that is legal."""
    is_auto = mesh.sp_prefill == "auto"
    traffic = PlannedTraffic(
        work.model, work.d2o, share, work.tokens, work.batch, work.dtype, work.chunk, is_auto, work.reading
    )
    held = rings(share, work.model, -(-work.tokens // share.sp), work.dtype, is_auto=is_auto)
    times = times_of(traffic, work.gpu, work.gpus_per_node, work.assume)
    return MeshPlan(
        dp=mesh.dp,
        share=held,
        memory=memory_of(work, held, work.batch),
        most_rows=most_rows(work, held),
        times=times,
        prompt=list(traffic.prompt()),
        step=list(traffic.steady()),
        batch=work.batch,
        batch_s=times.first_token + (work.new_tokens - 1) * times.token,
    )


def memory_of(work: Workload, share: Share, batch: int) -> PromptMemory:
    """Of a batch of so many rows."""
    return prompt_memory(
        work.model, work.d2o, share, work.tokens, batch, dtype=work.dtype, chunk=work.chunk, reading=work.reading
    )


def most_rows(work: Workload, share: Share) -> int:
    """The largest batch that fits: memory is linear in the rows, but for the weights."""
    one = memory_of(work, share, 1)
    return max(int((work.room - one.weights) // (one.peak - one.weights)), 0)
