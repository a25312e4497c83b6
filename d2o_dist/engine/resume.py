"""Going on with a job that was stopped: what is finished, and whether it is this job's.

`OUTPUT.job` says what made the rows of OUTPUT and of its part files: the settings, digests of the model's files, and
one of the prompts as token ids. A run goes on where all of that is its own. How rows are computed may differ: ranks,
batches, devices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2o_dist.comm.launch import num_restarts
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.encode import BadRow, Request
from d2o_dist.engine.output import check_output
from d2o_dist.engine.parts import check_own_parts, holds_records
from d2o_dist.engine.paths import Named
from d2o_dist.engine.records import Record, is_cut_off, is_special, read_records
from d2o_dist.engine.startup import flat
from d2o_dist.fields.io import to_json
from d2o_dist.files.whole import reason, remove_scratch, replace_text
from d2o_dist.models.digest import model_digests, one_digest, tokenizer_digests

Job = dict[str, Any]
_MADE_BY = "d2o_dist infer"
# Settings that change no row: where things lie (their content is compared), what is shown, how rows are computed.
_FREE = {
    "model", "tokenizer", "revision", "trust_remote_code", "prompts", "prompt", "output", "overwrite", "resume",
    "retry_failed", "stream", "trace", "device", "decode_graph", "prefill_chunk", "max_batch_size", "max_batch_tokens",
}  # fmt: skip
_SHOWN = 3


@dataclass(frozen=True)
class Earlier:
    """What earlier runs of a job have left.

    Attributes:
        records: of rows that stay, by index.
        files: that hold them.
        cut_off: indices of rows whose batch a rank's failure ended, to be tried once more.
        goes_on: whether there were such runs.
    """

    records: dict[int, Record] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    cut_off: tuple[int, ...] = ()
    goes_on: bool = False


def job_path(output: str) -> Path:
    """The file that says what made an output."""
    return Path(output).with_name(Path(output).name + ".job")


def describe(config: InferConfig, requests: Sequence[Request], bad_rows: Sequence[BadRow]) -> Job:
    """Everything that the rows of a job depend on, as plain values."""
    settings = {name: value for name, value in flat(config.to_dict()) if name not in _FREE}
    if config.parallel.merge_scope == "global":  # else the ranks change the text
        settings = {name: value for name, value in settings.items() if not name.startswith("parallel.")}
    sources = (model_digests(config.model, config.revision), tokenizer_digests(config.tokenizer or config.model))
    files = {name: digest for found in sources for name, digest in found.items()}
    files["the prompts"] = one_digest([repr(requests), repr(bad_rows)])
    # As it is read back: no tuples.
    return json.loads(to_json({"made_by": _MADE_BY, "settings": settings, "files": files}))


def check_job(config: InferConfig, job: Job, replicas: int, inputs: Sequence[Named] = ()) -> bool:
    """Whether the run goes on with what is at its output. To be asked of rank 0, before any work.

    A launcher that starts the same job again does not make it overwrite what it has.

    Raises:
        ValueError: as `check_output`; or there is something of another job, or of nobody's.
    """
    output = config.output
    if output in (None, "-") or is_special(Path(output)):
        check_output(output, config.overwrite, replicas, inputs)
        return False
    path, known = Path(output), _read_job(output)
    replaces = config.overwrite and not num_restarts()
    differ = [] if known is None else list(_differences(known, job))
    goes_on = known is not None and not differ and not replaces and (config.resume or config.overwrite)
    check_output(output, config.overwrite or (config.resume and known is not None), replicas, inputs)
    held = path.exists() and path.stat().st_size > 0
    if differ and not config.overwrite and (held or check_own_parts(path)):
        more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise ValueError(
            f"output {output} holds rows of another job, by {', '.join(differ[:_SHOWN])}{more}: name another output, "
            "or set overwrite=true"
        )
    if goes_on and held and not holds_records(path):
        raise ValueError(f"output {output} holds something else than the rows of this job: move it away")
    return goes_on


def find_earlier(config: InferConfig, num_rows: int) -> Earlier:
    """The rows that earlier runs of this job have finished; without those that are to be tried again."""
    path = Path(config.output)
    files = (path, *check_own_parts(path))
    records = {index: record for index, record in read_records(files).items() if 0 <= index < num_rows}
    again = [index for index, record in records.items() if is_cut_off(record)]
    gone = {index for index, record in records.items() if config.retry_failed and record["error"]}.union(again)
    records = {index: record for index, record in records.items() if index not in gone}
    return Earlier(records, files, tuple(sorted(again)), True)


def begin(output: str, job: Job, goes_on: bool) -> None:
    """Make the output ready for this job's rows. By rank 0, which holds its lock, before any file is opened.

    Raises:
        ValueError: there is no room, or no right, to write.
    """
    path = Path(output)
    try:
        remove_scratch(path)
        remove_scratch(job_path(output))
        if not goes_on:
            # What says whose the rows are is first to go and last to come: killed in between, they are nobody's.
            for old in (job_path(output), *check_own_parts(path), path):
                old.unlink(missing_ok=True)
            replace_text(job_path(output), to_json(job, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"output {output} cannot be written: {reason(error)}") from error


def _read_job(output: str) -> Job | None:
    """What is known of the job that wrote there; None: nothing.

    Raises:
        ValueError: a file of that name is somebody else's.
    """
    path = job_path(output)
    if not path.is_symlink() and not path.exists():
        return None
    try:
        found = None if path.is_symlink() else json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("made_by") != _MADE_BY:
        raise ValueError(f"{path} is not what a run says of its job: move it away, or name another output")
    return found


def _differences(old: Job, new: Job) -> Iterator[str]:
    """What is not the same, for people."""
    for part in ("settings", "files"):
        was, now = old[part], new[part]
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                yield name if part == "files" else f"{name} ({was.get(name)}, not {now.get(name)})"
