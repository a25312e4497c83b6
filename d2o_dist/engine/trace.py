"""What a run looked like from each rank: collectives by phase, and a profile of one decode step, as files.

    FOLDER/traffic-rank0.json   calls and bytes by phase, axis and kind, as `comm.traffic` counts them
    FOLDER/decode-rank0.json    Chrome trace of one decode step: open it in chrome://tracing or Perfetto

Counted is what this library sends. What a tensor-parallel engine sends inside a forward (two all_reduces a layer) shows
in the profile only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.io import to_json

# The first steps of a process still allocate and choose kernels.
PROFILED_STEP = 3


class Trace:
    """Counts and profiles one rank of one run.

    Args:
        folder: made if it is not there; files of an earlier trace are replaced.

    Attributes:
        counter: to hand to whatever communicates.
        num_steps: decode steps so far.
    """

    def __init__(self, folder: str | Path, mesh: ParallelMesh) -> None:
        self.counter = TrafficCounter()
        self.num_steps = 0
        self._folder, self._mesh = Path(folder), mesh
        self._folder.mkdir(parents=True, exist_ok=True)
        self.profile_path.unlink(missing_ok=True)

    @property
    def profile_path(self) -> Path:
        """Of this rank's Chrome trace; written by decode step `PROFILED_STEP`, if there is one."""
        return self._folder / f"decode-rank{self._mesh.rank}.json"

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around every decode step."""
        self.num_steps += 1
        if self.num_steps != PROFILED_STEP:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            yield
        profiler.export_chrome_trace(str(self.profile_path))

    def to_dict(self) -> dict[str, Any]:
        """What is written: this rank's place, its decode steps, and its traffic."""
        mesh = self._mesh
        return {
            "rank": mesh.rank,
            "dp": [mesh.dp_rank, mesh.dp],
            "sp": [mesh.sp_rank, mesh.sp],
            "tp": [mesh.tp_rank, mesh.tp],
            "decode_steps": self.num_steps,
            "traffic": self.counter.to_dict(),
        }

    def write(self) -> None:
        """Write this rank's counts."""
        path = self._folder / f"traffic-rank{self._mesh.rank}.json"
        path.write_text(to_json(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        profiled = f"profile: {self.profile_path}" if self.profile_path.exists() else "no decode step to profile"
        steps = f"{self.num_steps} decode steps of rank {self._mesh.rank}; {profiled}\n"
        return steps + (self.counter.table() if self.counter.total().calls else "nothing was sent between ranks")
