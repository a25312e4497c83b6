"""Where results go: one file, or while several replicas work a part file for each, joined at the end.

A part file is named `OUTPUT.part-N`, N the replica (see `engine.parts`). Replica N's first rank appends to it row by
row, so whatever ends a job, finished rows stay; rank 0 joins the parts, in the order of the input, when all replicas
are done. What earlier runs of the job have left is joined with them.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.engine.parts import check_own_parts, holds_records, spare_parts
from d2o_dist.engine.paths import Named, check_apart
from d2o_dist.engine.records import Record, RecordWriter, check_file, is_special, read_records, to_line
from d2o_dist.files.whole import reason, replace_text


def check_output(output: str | None, overwrite: bool, replicas: int = 1, inputs: Iterable[Named] = ()) -> None:
    """Refuse, before any work, an output that could not be written or that would replace something else.

    Args:
        inputs: (what it is, path) of the files that the run reads.

    Raises:
        ValueError: the file is one of `inputs`; it or a part of it exists and `overwrite` is false; a file that is not
            this program's is named like a part; it is a folder or a link; its folder cannot be made or written; or
            several replicas have no file.
    """
    if output in (None, "-"):
        if replicas > 1:
            raise ValueError(f"{replicas} replicas (dp) write their results to part files: name an output file")
        return
    path = Path(output)
    check_apart(path, inputs)
    check_file(path, overwrite)
    left = check_own_parts(path)
    if left and not overwrite:
        raise ValueError(
            f"{left[0]} holds results of a run that did not end: keep or delete it, or set overwrite=true"
        )
    if replicas > 1 and is_special(path):
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
    # A name that nobody has, so that no file of anybody's is touched.
    job = Collectives(mesh.axis("world")).broadcast_object(uuid.uuid4().hex[:8])
    mine, made = _probe(output, job, mesh.dp_rank), False
    try:
        with agreed(mesh):
            if mesh.leads_request:
                check_file(mine, True)
                mine.touch(exist_ok=False)
                made = True
        with agreed(mesh):
            if mesh.rank == 0:
                _find_all([_probe(output, job, replica) for replica in range(mesh.dp)], patience_s)
    finally:
        if made:
            mine.unlink(missing_ok=True)


def _probe(output: str, job: str, replica: int) -> Path:
    return Path(output).with_name(f".{job}.{Path(output).name}.probe-{replica}")


def _find_all(paths: list[Path], patience_s: float) -> None:
    ends = time.monotonic() + patience_s
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > ends:
            raise ValueError(
                f"{missing[0]} cannot be seen by rank 0: with several replicas (dp) the output must lie on a file "
                "system that all machines share"
            )
        time.sleep(0.1)


def lock_path(output: str | None) -> Path | None:
    """The file that one run at a time holds; None for standard output, a device or a pipe."""
    path = None if output in (None, "-") else Path(output)
    if path is None or is_special(path):
        return None
    return path.with_name(path.name + ".lock")


def open_writer(
    output: str | None, mesh: ParallelMesh, *, quiet: bool = False, earlier: Iterable[Record] = ()
) -> RecordWriter:
    """This rank's writer: the output itself for one replica, else a part; ranks that lead no replica write nothing.

    Args:
        quiet: no records on standard output.
        earlier: what the output holds already.

    Raises:
        ValueError: the file cannot be opened.
    """
    if not mesh.leads_request:
        return RecordWriter(None, quiet=True)
    spare = None if mesh.dp == 1 else spare_parts(output, mesh.dp_rank)
    name = output if spare is None else str(spare(0))
    try:
        return RecordWriter(name, quiet=quiet, spare=spare, earlier=earlier if spare is None else ())
    except OSError as error:
        raise ValueError(f"output {name} cannot be written: {reason(error)}") from error


def identity(output: str | None) -> tuple[int, ...] | None:
    """What tells a file from another that took its place, or from itself with another content; None: no file."""
    if output in (None, "-"):
        return None
    try:
        found = os.lstat(output)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_unchanged(output: str, before: tuple[int, ...] | None) -> None:
    """Refuse to replace a file that something else wrote during the run.

    Args:
        before: `identity` of the output when the run began.

    Raises:
        ValueError: the output is there, and is not that.
    """
    if identity(output) not in (None, before):
        raise ValueError(f"output {output} was written by something else meanwhile: the part files hold the results")


def check_parts(parts: Iterable[Path]) -> None:
    """Refuse to join what is not all there.

    Raises:
        ValueError: a part is not: it lies on another machine.
    """
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]} cannot be seen by rank 0: with several replicas (dp) the output must lie on a file system "
            "that all machines share. The part files hold the results"
        )


def join_files(target: Path, files: Iterable[Path], expected: int | None) -> list[Record]:
    """Write `target` from files of records, in the order of the input, as a whole or not at all, and delete the others.

    Args:
        expected: number of rows; None: what there is.

    Raises:
        ValueError: rows are missing; OSError: there is no room. All files are then as they were.
    """
    files = list(files)
    records = [record for _, record in sorted(read_records(files).items())]
    if expected is not None and len(records) != expected:
        raise ValueError(
            f"the files of {target} hold {len(records)} rows, not {expected}: give the same command again to make the "
            "others"
        )
    replace_text(target, "".join(map(to_line, records)))
    for file in files:
        if file != target and holds_records(file):
            file.unlink()
    return records
