"""Where results go: one file, or while several replicas work a part file for each, joined at the end.

A part file is named `OUTPUT.part-N`, N the replica. Replica N's first rank appends to it batch by batch, so whatever
ends a job, finished rows stay; rank 0 joins the parts, in the order of the input, when all replicas are done.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.engine.agreement import agreed
from d2o_dist.engine.records import Record, RecordWriter, check_file, to_line


def check_output(output: str | None, overwrite: bool, replicas: int = 1) -> None:
    """Refuse, before any work, an output that could not be written or that would replace earlier results.

    Raises:
        ValueError: the file or a part of it exists and `overwrite` is false, it is a folder, its folder cannot be made
            or written, or several replicas have no file.
    """
    if output in (None, "-"):
        if replicas > 1:
            raise ValueError(f"{replicas} replicas (dp) write their results to part files: name an output file")
        return
    path = Path(output)
    check_file(path, overwrite)
    left = stale_parts(path)
    if left and not overwrite:
        raise ValueError(
            f"{left[0]} holds results of a run that did not end: keep or delete it, or set overwrite=true"
        )
    if replicas > 1 and path.exists() and not path.is_file():
        raise ValueError(f"output {path} is not a regular file, and {replicas} replicas (dp) need parts of it")


def check_shared(output: str, mesh: ParallelMesh, patience_s: float = 5.0) -> None:
    """Refuse, before any work, an output that the replicas' machines do not share. All ranks call it together.

    Args:
        patience_s: how long rank 0 looks for the files of others: network file systems may show them late.

    Raises:
        ValueError: on all ranks.
    """
    if mesh.dp == 1:
        return
    mine = _probe(output, mesh.dp_rank)
    try:
        with agreed(mesh):
            if mesh.leads_request:
                check_file(mine, True)
                mine.touch()
        with agreed(mesh):
            if mesh.rank == 0:
                _find_all([_probe(output, replica) for replica in range(mesh.dp)], patience_s)
    finally:
        if mesh.leads_request:
            mine.unlink(missing_ok=True)


def _probe(output: str, replica: int) -> Path:
    return Path(output).with_name(f"{Path(output).name}.probe-{replica}")


def _find_all(paths: list[Path], patience_s: float) -> None:
    ends = time.monotonic() + patience_s
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > ends:
            raise ValueError(
                f"{missing[0]} cannot be seen by rank 0: with several replicas (dp) the output must lie on a file "
                "system that all machines share"
            )
        time.sleep(0.1)


def part_path(output: str | Path, replica: int) -> Path:
    """The part file of a replica."""
    path = Path(output)
    return path.with_name(f"{path.name}.part-{replica}")


def stale_parts(path: Path) -> list[Path]:
    """Part files beside an output."""
    prefix = path.name + ".part-"
    return sorted(p for p in path.parent.iterdir() if p.name.startswith(prefix)) if path.parent.is_dir() else []


def lock_path(output: str | None) -> Path | None:
    """The file that one run at a time holds; None for standard output, a device or a pipe."""
    path = None if output in (None, "-") else Path(output)
    if path is None or (path.exists() and not path.is_file()):
        return None
    return path.with_name(path.name + ".lock")


def clear_parts(output: str | None, mesh: ParallelMesh) -> None:
    """Delete what an earlier run left, once nothing can be wrong any more; by rank 0, before any part is opened."""
    if mesh.rank == 0 and output not in (None, "-"):
        for part in stale_parts(Path(output)):
            part.unlink()


def open_writer(output: str | None, mesh: ParallelMesh, *, quiet: bool = False) -> RecordWriter:
    """This rank's writer: the output itself for one replica, else a part; ranks that lead no replica write nothing.

    Args:
        quiet: no records on standard output.
    """
    if not mesh.leads_request:
        return RecordWriter(None, quiet=True)
    return RecordWriter(output if mesh.dp == 1 else str(part_path(output, mesh.dp_rank)), quiet=quiet)


def join_parts(output: str, replicas: int, expected: int) -> list[Record]:
    """Write the output from its parts, in the order of the input, and delete them; it is replaced as a whole.

    Raises:
        ValueError: a part, or a row, is not there: the parts lie on other machines.
    """
    parts = [part_path(output, replica) for replica in range(replicas)]
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]} cannot be seen by rank 0: with several replicas (dp) the output must lie on a file system "
            "that all machines share. The part files hold the results"
        )
    # Not splitlines(): texts may hold line separators of Unicode.
    lines = [line for part in parts for line in part.read_text(encoding="utf-8").split("\n") if line]
    records = [json.loads(line) for line in lines]
    if len(records) != expected:
        raise ValueError(f"the part files of {output} hold {len(records)} rows, not {expected}")
    records.sort(key=lambda record: record["index"])
    path = Path(output)
    scratch = path.with_name(path.name + ".sorting")
    scratch.write_text("".join(map(to_line, records)), encoding="utf-8")
    os.replace(scratch, path)
    for part in parts:
        part.unlink()
    return records
