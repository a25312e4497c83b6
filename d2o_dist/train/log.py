"""What a run says: a line a step on the console, and the same as JSON in `log.jsonl`. The first rank speaks."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from d2o_dist.fields.io import to_json
from d2o_dist.files.whole import replace_text

LOG_FILE, DROPPED_FILE = "log.jsonl", "log-dropped.jsonl"


def peak_memory_bytes() -> int:
    """The most device memory that PyTorch has held; without CUDA, the most memory this process has had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunLog:
    """Records of a run, each step once: a run that goes on drops what an earlier one said of steps taken again.

    Args:
        folder: where `log.jsonl` is appended to; None: nothing is written or said (ranks other than the first).
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / LOG_FILE

    def say(self, line: str) -> None:
        """A line for the console alone."""
        if self.path is not None:
            print(line, file=sys.stderr, flush=True)

    def go_on(self, step: int | None) -> None:
        """Keep the records up to a step (None: none of them); the others go to `log-dropped.jsonl`."""
        if self.path is None or not self.path.is_file():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        dropped = [line for line in lines if not _is_up_to(line, step)]
        if not dropped:
            if text and not text.endswith("\n"):  # a killed run wrote all but the line break
                replace_text(self.path, text + "\n")
            return
        with self.path.with_name(DROPPED_FILE).open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in dropped)
        replace_text(self.path, "".join(line + "\n" for line in lines if _is_up_to(line, step)))
        self.say(f"{len(dropped)} records of {LOG_FILE}, of steps that are taken again, are moved to {DROPPED_FILE}")

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """One record: `{"kind": kind, **values}`; None values are left out."""
        if self.path is None:
            return
        values = {name: value for name, value in values.items() if value is not None}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json({"kind": kind, **values}) + "\n")
        self.say(f"{kind}: " + "  ".join(f"{name} {_short(value)}" for name, value in values.items()))


def _is_up_to(line: str, step: int | None) -> bool:
    """Whether a line is a record of a step that is done. What a killed run has written in part is none."""
    try:
        return step is not None and json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
