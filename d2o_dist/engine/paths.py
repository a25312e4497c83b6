"""Two names of one file: what a run writes must not be what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2o_dist.config.infer import InferConfig
from d2o_dist.models.digest import model_paths, tokenizer_paths

Named = tuple[str, str | Path]


def inputs_of(config: InferConfig, config_file: str | None = None) -> Iterator[Named]:
    """(what it is, path) of every file that a run reads, as far as they are on this machine."""
    if config_file is not None:
        yield "the configuration", config_file
    if config.prompts is not None:
        yield "the prompts", config.prompts
    for what, name, listed in (
        ("the model", config.model, model_paths),
        ("the model", config.model, tokenizer_paths),
        ("the tokenizer", config.tokenizer, tokenizer_paths),
    ):
        folder = None if name is None else Path(name).expanduser()
        if folder is not None and folder.is_dir():
            yield from ((f"a file of {what}", path) for path in listed(folder))


def check_apart(output: Path, inputs: Iterable[Named]) -> None:
    """Refuse to write what is read, whatever it is called: by another path, a symbolic or a hard link.

    Raises:
        ValueError: names both.
    """
    for what, path in inputs:
        if same_file(output, Path(path)):
            raise ValueError(f"output {output} and {path}, {what}, are one file: name another output")


def check_outside(folder: Path, inputs: Iterable[Named]) -> None:
    """Refuse to read from a folder that the run replaces.

    Raises:
        ValueError: names the file and the folder.
    """
    root = os.path.realpath(folder)
    for what, path in inputs:
        if os.path.realpath(path).startswith(root + os.sep):
            raise ValueError(f"{path}, {what}, lies in {folder}, which the run replaces: name another output")


def same_file(one: Path, other: Path) -> bool:
    """Whether two names lead, or would lead, to one file."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False  # one of them is not there
