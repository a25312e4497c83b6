"""What a run looked like from each rank: collectives by phase, and a profile of one decode step, as files.

    FOLDER/traffic-rank0.json   calls and bytes by phase, axis and kind, as `comm.traffic` counts them; times of rows
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
from d2o_dist.fields.io import to_json
from d2o_dist.files.whole import reason, replace_text

# The first steps of a process still allocate and choose kernels.
PROFILED_STEP = 3


# What each file holds near its beginning, whoever made it with this program.
_BEGINNINGS = (b'"dp"', b'"schemaVersion"')


def trace_files(folder: Path, rank: int) -> tuple[Path, Path]:
    """The counts and the profile of a rank."""
    return folder / f"traffic-rank{rank}.json", folder / f"decode-rank{rank}.json"


def check_trace(folder: Path, rank: int) -> None:
    """Refuse to replace files that no trace has left.

    Raises:
        ValueError: names the file.
    """
    for path, begins in zip(trace_files(folder, rank), _BEGINNINGS, strict=True):
        if not path.is_symlink() and not path.exists():
            continue
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                start = file.read(200)
            if not start or begins in start:
                continue
        raise ValueError(f"{path} is in the way of a trace, and no trace has left it: name another folder")


class Trace:
    """Counts and profiles one rank of one run.

    Args:
        folder: made if it is not there; files of an earlier trace are replaced.

    Raises:
        ValueError: as `check_trace`.

    Attributes:
        counter: to hand to whatever communicates.
        num_steps: decode steps so far.
    """

    def __init__(self, folder: str | Path, mesh: ParallelMesh) -> None:
        self.counter = TrafficCounter()
        self.num_steps = 0
        self._rows: list[dict[str, Any]] = []
        self._folder, self._mesh = Path(folder), mesh
        check_trace(self._folder, mesh.rank)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.profile_path.unlink(missing_ok=True)

    @property
    def profile_path(self) -> Path:
        """Of this rank's Chrome trace; written by decode step `PROFILED_STEP`, if there is one."""
        return trace_files(self._folder, self._mesh.rank)[1]

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
            "rows": self._rows,
        }

    def add_row(self, index: int, time_to_first_token_s: float, tokens_per_s: float | None) -> None:
        """What a row took."""
        self._rows.append(
            {"index": index, "time_to_first_token_s": time_to_first_token_s, "tokens_per_s": tokens_per_s}
        )

    def write(self) -> str:
        """Write this rank's counts; what to tell of them."""
        path = trace_files(self._folder, self._mesh.rank)[0]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_text(path, to_json(self.to_dict(), indent=1) + "\n")
        except OSError as error:  # no reason to lose the results
            return f"trace {path} cannot be written: {reason(error)}"
        return str(self)

    def __str__(self) -> str:
        profiled = f"profile: {self.profile_path}" if self.profile_path.exists() else "no decode step to profile"
        steps = f"{self.num_steps} decode steps of rank {self._mesh.rank}; {profiled}\n"
        return steps + (self.counter.table() if self.counter.total().calls else "nothing was sent between ranks")
