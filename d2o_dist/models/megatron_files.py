"""The files of a Megatron model on disk. Nothing here needs megatron-core."""

from __future__ import annotations

import json
from pathlib import Path

from d2o_dist.config.megatron import ARGUMENTS

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
# What Megatron writes beside the checkpoints of a training run: the iteration of the newest, or `release`.
_TRACKER = "latest_checkpointed_iteration.txt"


def is_megatron(folder: Path) -> bool:
    """Whether the folder says that it holds a Megatron model."""
    return (folder / ARGUMENTS).is_file()


def weights_folder(folder: Path) -> Path:
    """Where the checkpoint is: the folder itself, or the one of the newest iteration in it.

    Raises:
        ValueError: no checkpoint of the format torch_dist, or files of it are missing.
    """
    tracker = folder / _TRACKER
    if not (folder / FORMAT).is_file() and tracker.is_file():
        newest = tracker.read_text(encoding="utf-8", errors="replace").strip()
        name = newest if newest == "release" else f"iter_{newest:0>7}"
        folder = folder / Path(name).name
    for name in (FORMAT, METADATA):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: a distributed checkpoint of Megatron has {FORMAT}, {METADATA} "
                             "and *.distcp")  # fmt: skip
    if not any(folder.glob("*.distcp")):
        raise ValueError(f"{folder} has no *.distcp: the weights are missing")
    try:
        found = json.loads((folder / FORMAT).read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FORMAT} does not say its sharded_backend") from error
    if found != "torch_dist":
        raise ValueError(f"sharded_backend ({found}) of {folder} must be torch_dist")
    return folder


def megatron_paths(folder: Path) -> list[Path]:
    """The files that a model is made from; those that are there."""
    found = [folder / ARGUMENTS, folder / _TRACKER]
    try:
        weights = weights_folder(folder)
    except (OSError, ValueError):
        return [path for path in found if path.is_file()]  # whoever loads the model says what is wrong
    found += [weights / name for name in (FORMAT, METADATA, COMMON)] + sorted(weights.glob("*.distcp"))
    return [path for path in found if path.is_file()]
