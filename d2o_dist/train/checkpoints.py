"""Checkpoints of a run: whole or not there at all. The last and the best one are kept, and where they are one, another.

    output/checkpoints/step-00000100/     what the engine wrote, state.json, and manifest.json, which is written last
    output/checkpoints/last, best         text files that name one of them

A folder gets its name when all ranks have written and its manifest is on the disk; what a killed run leaves has another
name and is removed later. What is there counts, not what the text files say: see `resumable`.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from d2o_dist.comm import Collectives
from d2o_dist.fields.io import to_json
from d2o_dist.files.whole import replace_text
from d2o_dist.train.manifest import fault, files_in, seal, sync

STATE_FILE = "state.json"
_UNFINISHED = "unfinished-"
_STEP = re.compile(r"step-(\d+)")
# Network file systems may show the files of another machine up to a minute late.
_PATIENCE_S = 100.0


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        best: the lowest measure so far; None before the first.
        measured: what was measured at this step; None if nothing was.
        facts: how the run was made; see `resume`.
    """

    step: int = 0
    best: float | None = None
    measured: float | None = None
    facts: dict | None = None


class Checkpoints:
    """The checkpoints of one run. `save` and `find` are called by all ranks, the others by one.

    Args:
        folder: `output/checkpoints`; seen by all ranks.
        world: over all ranks.
    """

    def __init__(self, folder: Path, world: Collectives) -> None:
        self.folder = folder
        self.world = world

    def save(self, state: RunState, write: Callable[[Path], None], *, is_best: bool) -> Path:
        """Write one. `write` is given a folder that exists, on every rank.

        Only after it is complete, on the disk and named as `last` are older ones removed, except the best; where that
        is this one, or none, except the newest of them: one damaged file must not be the end of a run.

        Raises:
            OSError: the first rank does not see what another has written. On all ranks.
        """
        name = f"step-{state.step:08d}"
        scratch, final = self.folder / (_UNFINISHED + name), self.folder / name
        if self._leads:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            (scratch / STATE_FILE).write_text(to_json(asdict(state), indent=1), encoding="utf-8")
        self.world.barrier()
        write(scratch)
        self._check_all_seen(scratch)
        if self._leads:
            seal(scratch)
            self._put(scratch, final)
            sync(self.folder)
            # The best one first: a run that ends in between takes this step again.
            best = final if is_best else self._best()
            if best is not None:
                self._point("best", best.name)
            self._point("last", name)
            sync(self.folder)
            if fault(final, read=False) is None:
                other = self._before(state.step) if best in (None, final) else best
                self._prune(state.step, {final, other})
        self.world.barrier()
        return final

    def find(self, which: str = "last") -> Path | None:
        """The complete one that `last` or `best` names, as the first rank sees it; None if there is none."""
        named = self._named(which)[0] if self._leads else None
        name = self.world.broadcast_object(None if named is None else named.name)
        return None if name is None else self.folder / name

    def resumable(self) -> tuple[Path | None, str | None]:
        """The complete one to go on from, and what is to be said where it is not the one that `last` names.

        `(None, None)`: no run has left any.

        Raises:
            ValueError: there were some, and none is complete.
        """
        there = self._all()
        if not self.any:
            return None, None
        named, why = self._named("last")
        if named is not None:
            newer = [folder.name for folder in there[: there.index(named)] if fault(folder, read=False) is None]
            return named, f"{newer[0]} is newer than {named.name}, which last names: it is not used" if newer else None
        faults = [why]
        for folder in there:
            found = fault(folder)
            if found is None:
                return folder, f"{'; '.join(faults)}: {folder.name} is taken, the newest that is complete"
            faults += [found] if found not in faults else []
        raise ValueError(
            f"{'; '.join(faults)}: no checkpoint in {self.folder} is complete. Put it right, delete that folder to "
            "begin at step 0, or name another output"
        )

    @property
    def any(self) -> bool:
        """Whether a run has left anything that was a checkpoint."""
        return bool(self._all()) or (self.folder / "last").exists()

    @staticmethod
    def read(folder: Path) -> RunState:
        """The state in a checkpoint."""
        return RunState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))

    @property
    def _leads(self) -> bool:
        return self.world.rank == 0

    def _all(self) -> list[Path]:
        """Folders of checkpoints, complete or not, the newest first."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in folders if path.is_dir() and _step(path) is not None), key=_step, reverse=True)

    def _named(self, which: str, *, read: bool = True) -> tuple[Path | None, str]:
        """The complete one that a text file names; or None, and why. read: as in `fault`."""
        pointer = self.folder / which
        if not pointer.is_file():
            return None, f"{pointer} is not there"
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        folder = self.folder / name
        if not _STEP.fullmatch(name):
            return None, f"{pointer} names no checkpoint" + (f" ({name[:40]!r})" if name else ", it is empty")
        if not folder.is_dir():
            return None, f"{pointer} names {name}, which is not there"
        found = fault(folder, read=read)
        return (folder, "") if found is None else (None, found)

    def _best(self) -> Path | None:
        """The best one so far: what `best` names or, if that is lost, the best of those that are left."""
        named, _ = self._named("best", read=False)
        if named is not None:
            return named
        there = [folder for folder in self._all() if fault(folder, read=False) is None]
        measured = {folder: self.read(folder).measured for folder in there}
        known = {folder: value for folder, value in measured.items() if value is not None}
        return min(known, key=known.__getitem__) if known else None

    def _before(self, step: int) -> Path | None:
        """The newest one before a step."""
        older = (folder for folder in self._all() if _step(folder) < step)
        return next((folder for folder in older if fault(folder, read=False) is None), None)

    def _point(self, which: str, name: str) -> None:
        replace_text(self.folder / which, name + "\n")

    def _put(self, scratch: Path, final: Path) -> None:
        """Give the folder its name. One of that name is damaged, or was not gone on from: it is pruned afterwards."""
        if final.exists():
            old = self.folder / f"{_UNFINISHED}replaced-{final.name}"
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        scratch.rename(final)

    def _prune(self, step: int, kept: set[Path | None]) -> None:
        """Remove what is older than a step, and what is unfinished."""
        for folder in self.folder.iterdir():
            number = _step(folder)
            old = folder.name.startswith(_UNFINISHED) if number is None else number <= step and folder not in kept
            if old and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)

    def _check_all_seen(self, folder: Path) -> None:
        """A barrier, after which the first rank sees the files of all ranks."""
        listed = self.world.all_gather_object(files_in(folder))
        unseen = None
        if self._leads:
            ends = time.monotonic() + _PATIENCE_S
            while (unseen := _unseen(folder, listed)) and time.monotonic() < ends:
                time.sleep(0.5)
        unseen = self.world.broadcast_object(unseen)
        if unseen:
            raise OSError(f"{unseen}, which rank 0 does not see: output must lie where all machines see it")


def _step(folder: Path) -> int | None:
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def _unseen(folder: Path, listed: list[list[str]]) -> str | None:
    """A file that a rank has written and this one cannot see."""
    for rank, names in enumerate(listed):
        for name in names:
            if not (folder / name).is_file():
                return f"rank {rank} has written {folder / name}"
    return None
