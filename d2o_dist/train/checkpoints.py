"""Checkpoints of a run: whole or not there at all, the last and the best one kept.

    output/checkpoints/step-00000100/     what the engine wrote, and state.json
    output/checkpoints/last, best         text files that name one of them

A folder gets its name when all ranks have written; what a killed run leaves has another name and is removed later.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from d2o_dist.comm import Collectives
from d2o_dist.config.io import to_json

STATE_FILE = "state.json"
_UNFINISHED = "unfinished-"


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        best: the lowest measure so far; None before the first.
        measured: what was measured at this step; None if nothing was.
        facts: what must not change when a run is resumed.
    """

    step: int = 0
    best: float | None = None
    measured: float | None = None
    facts: dict | None = None


class Checkpoints:
    """The checkpoints of one run. All methods but `read` are called by all ranks.

    Args:
        folder: `output/checkpoints`; seen by all ranks.
        world: over all ranks.
    """

    def __init__(self, folder: Path, world: Collectives) -> None:
        self.folder = folder
        self.world = world

    def save(self, state: RunState, write: Callable[[Path], None], *, is_best: bool) -> Path:
        """Write one. `write` is given a folder that exists, on every rank.

        Only after it is complete and named as `last` are older ones removed, except the best.
        """
        name = f"step-{state.step:08d}"
        scratch, final = self.folder / (_UNFINISHED + name), self.folder / name
        if self._leads:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            (scratch / STATE_FILE).write_text(to_json(asdict(state)), encoding="utf-8")
        self.world.barrier()
        write(scratch)
        self.world.barrier()
        if self._leads:
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
            self._point("last", name)
            if is_best:
                self._point("best", name)
            self._prune()
        self.world.barrier()
        return final

    def find(self, which: str = "last") -> Path | None:
        """The folder that `last` or `best` names, as the first rank sees it; None if there is none."""
        return self.world.broadcast_object(self._named(which) if self._leads else None)

    @staticmethod
    def read(folder: Path) -> RunState:
        """The state in a checkpoint."""
        return RunState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))

    @property
    def _leads(self) -> bool:
        return self.world.rank == 0

    def _named(self, which: str) -> Path | None:
        pointer = self.folder / which
        folder = self.folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
        return folder if folder is not None and (folder / STATE_FILE).is_file() else None

    def _point(self, which: str, name: str) -> None:
        scratch = self.folder / f".{which}"
        with scratch.open("w", encoding="utf-8") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self.folder / which)

    def _prune(self) -> None:
        kept = {self._named("last"), self._named("best")}
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
