"""What a run says: a line a step on the console, and the same as JSON in `log.jsonl`. The first rank speaks."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

from d2o_dist.config.io import to_json

LOG_FILE = "log.jsonl"


def peak_memory_bytes() -> int:
    """The most device memory that PyTorch has held; without CUDA, the most memory this process has had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunLog:
    """Records of a run.

    Args:
        folder: where `log.jsonl` is appended to; None: nothing is written or said (ranks other than the first).
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / LOG_FILE

    def say(self, line: str) -> None:
        """A line for the console alone."""
        if self.path is not None:
            print(line, file=sys.stderr, flush=True)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """One record: `{"kind": kind, **values}`; None values are left out."""
        if self.path is None:
            return
        values = {name: value for name, value in values.items() if value is not None}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json({"kind": kind, **values}) + "\n")
        self.say(f"{kind}: " + "  ".join(f"{name} {_short(value)}" for name, value in values.items()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
