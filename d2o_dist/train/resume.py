"""What a run that goes on must have in common with the one that wrote the checkpoint, and what it need not.

A checkpoint holds the whole configuration it was made under. All fields must be the same but those that are named here:
what is not known to be harmless is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2o_dist.config.train import TrainConfig
from d2o_dist.train.checkpoints import Checkpoints, RunState
from d2o_dist.train.rows import PackedRows, WindowRows

# What trains nothing: where things lie and who is told. `d2o` gets its size from the drawn ratio, not from its fields.
UNREAD = {"output", "resume", "d2o.keep_ratio", "d2o.keep_tokens"}
# How the same steps are computed, and what is said and saved of them.
MAY_DIFFER = {
    "trust_remote_code", "trust_pickled_weights", "device", "sp", "ranks", "micro_batch_size",
    "activation_checkpointing", "loss_tile",
    "engine.offload_optimizer", "engine.offload_parameters", "data.num_workers",
    "log_every", "eval_every", "save_every", "eval_tasks", "timeout",
}  # fmt: skip
# What the best checkpoint is chosen by: the same once something was measured.
MEASURED_BY = {"data.validation", "data.validation_split", "data.max_validation_rows", "eval_ratios"}
_PLACES = (("model",), ("tokenizer",), ("data", "train"), ("data", "validation"))


def make_facts(config: TrainConfig, ranks: int) -> dict[str, Any]:
    """What a checkpoint says of its run: `config`, all of it, and `ranks`. Paths do not depend on where one stands."""
    values = config.to_dict()
    for *parts, name in _PLACES:
        part = values
        for key in parts:
            part = part[key]
        if part[name] is not None and Path(part[name]).expanduser().exists():
            part[name] = str(Path(part[name]).expanduser().resolve())
    return {"config": values, "ranks": ranks}


def digest_rows(rows: PackedRows | WindowRows | None) -> str | None:
    """A checksum of the documents' lengths and of the tokens of the first and the last row: cheap, and changed by most
    changes of the data."""
    if rows is None or not len(rows):
        return None
    found = hashlib.sha256(rows.source.lengths.tobytes())
    for number in (0, len(rows) - 1):
        found.update(rows[number].input_ids.tobytes())
    return found.hexdigest()


def go_on(checkpoints: Checkpoints, config: TrainConfig, ranks: int) -> tuple[Path | None, RunState, list[str]]:
    """The checkpoint to go on from (None: begin), the state in it, and lines that the user should read.

    Asked of one rank. The state has the facts of the run that goes on.

    Raises:
        ValueError: there are checkpoints and `resume` is false, none of them is complete, or the configuration differs
            from the one of the run where it must not.
    """
    facts = make_facts(config, ranks)
    if not config.resume and checkpoints.any:
        raise ValueError(f"output ({config.output}) holds checkpoints: set resume to true, or name another folder")
    folder, note = checkpoints.resumable()
    if folder is None:
        return None, RunState(facts=facts), []
    state = checkpoints.read(folder)
    notes = [] if note is None else [note]
    other = _compare(folder, state, facts)
    if other:
        notes.append(f"goes on from {folder.name} with " + ", ".join(other))
    if config.steps < state.step:
        raise ValueError(f"steps ({config.steps}) must be at least the steps that {folder} has done ({state.step})")
    return folder, replace(state, facts={**state.facts, **facts}), notes


def check_data(folder: Path | None, state: RunState, found: Mapping[str, str | None]) -> RunState:
    """The state with checksums of the data, `train` and `validation`, compared with those in a checkpoint.

    Raises:
        ValueError: documents are not those that the run was trained or measured on.
    """
    for name, digest in found.items() if folder is not None else ():
        said = state.facts["data"][name]
        if digest != said and (name == "train" or state.best is not None):
            raise ValueError(
                f"data.{name} holds other documents (checksum {str(digest)[:8]}) than those of the run in {folder} "
                f"({str(said)[:8]}): put them back, or name another output"
            )
    return replace(state, facts={**state.facts, "data": dict(found)})


def _compare(folder: Path, state: RunState, facts: dict[str, Any]) -> list[str]:
    """Differences that are allowed, each as `save_every 5 (was 2)`."""
    try:
        # Read anew, so that fields of a later version have the values they had then: their defaults.
        before = TrainConfig.from_dict(state.facts["config"]).to_dict()
    except ValueError as error:
        raise ValueError(f"{folder} was made by another version: {error}; name another output") from error
    refused, allowed = [], []
    constant_rate = facts["config"]["optimizer"]["min_lr_ratio"] == 1
    before |= {"ranks": state.facts["ranks"]}
    for name, was, now in differences(before, facts["config"] | {"ranks": facts["ranks"]}):
        may = name in MAY_DIFFER or (name in MEASURED_BY and state.best is None) or (name == "steps" and constant_rate)
        if may:
            allowed.append(f"{name} {_said(now)} (was {_said(was)})")
        elif name not in UNREAD:
            refused.append((name, was, now))
    if refused:
        (name, was, now), *more = refused
        why = ""
        if any(name == "steps" for name, *_ in refused):
            why = "; the learning rate falls with the number of steps unless optimizer.min_lr_ratio is 1"
        raise ValueError(
            f"{name} ({_said(now)}) must be that of the run in {folder} ({_said(was)})"
            + "".join(f", {name} ({_said(now)}) too ({_said(was)})" for name, was, now in more)
            + f"{why}: put it back, or name another output"
        )
    return allowed


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """`(dotted name, value before, value now)` of each leaf that differs between nested mappings."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def _said(value: Any) -> str:
    return "null" if value is None else str(value)
