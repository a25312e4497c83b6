"""LongBench's own prompts and limits, from a user's copies of `dataset2prompt.json` and `dataset2maxlen.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2o_dist.config.eval_tasks import LongBenchTask
from d2o_dist.eval.tasks.longbench_prompts import SPECS, Spec
from d2o_dist.fields.checks import check_int

_CONTEXT = "{context}"


def spec_of(config: LongBenchTask, task: str) -> Spec:
    """The task with the prompt and the limit of the files that the configuration names, if any.

    Raises:
        ValueError: a file that is missing or no JSON, or that has no usable entry for the task.
    """
    spec = SPECS[task]
    if config.prompts_file is not None:
        prompt = _entry(config.prompts_file, task)
        if not isinstance(prompt, str) or prompt.count(_CONTEXT) != 1:
            raise ValueError(f"prompts_file {config.prompts_file}: {task} must be a text with one {_CONTEXT}")
        before, after = prompt.split(_CONTEXT)
        spec = replace(spec, before=before, after=after)
    if config.lengths_file is not None:
        length = _entry(config.lengths_file, task)
        check_int(f"lengths_file {config.lengths_file}: {task}", length, low=1)
        spec = replace(spec, max_new_tokens=length)
    return spec


def wording(config: LongBenchTask) -> str:
    """Whose prompts and limits these are, for results: a file by its name and the begin of its SHA-256."""
    prompts, lengths = map(_digest, (config.prompts_file, config.lengths_file))
    return f"prompts: {prompts or 'our own wording'}; new tokens: {lengths or 'as published'}"


def _digest(path: str | None) -> str | None:
    return path and f"{Path(path).name}, sha256 {hashlib.sha256(_read(path)).hexdigest()[:12]}"


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _entry(path: str, task: str) -> Any:
    try:
        entries = json.loads(_read(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, dict) or task not in entries:
        raise ValueError(f"{path} has nothing for {task}")
    return entries[task]
