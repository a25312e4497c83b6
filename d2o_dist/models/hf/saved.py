"""Caches in files: one of safetensors for each rank that shares the request, with JSON in its header.

A file is written under another name and then renamed, so that it is there as a whole or not at all.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from d2o_dist.cache.stored import Stored, put_together, take_apart
from d2o_dist.comm.agreement import agreed_over
from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.files.whole import reason, replaced
from d2o_dist.models.cache import ModelCache
from d2o_dist.models.hf.identity import find_modules
from d2o_dist.policy.config import D2OConfig

# To be raised when what a file says changes its meaning; that attributes come and go is seen without it.
FORMAT = 1
_KEY, _FILES = "d2o_cache", re.compile(r"cache(-\d+-of-(\d+))?\.safetensors")
# What ranks must share a request by to go on with a cache; the rest may differ.
_SHARING = ("sp_prefill", "cache_layout", "merge_scope")


def save(folder: str | Path, cache: ModelCache, facts: Mapping[str, Any]) -> None:
    """Write a cache, on all ranks that share it together.

    Args:
        facts: what to say of it, plain values; `load` gives them back. `model` is what `describe_model` says.

    Raises:
        ValueError: it cannot be written, is in the middle of a forward, or other ranks have saved one there; on all
            ranks alike.
    """
    folder, ranks = Path(folder).expanduser(), cache.ranks
    path = folder / _name(ranks.request)
    one = ranks.request.all_gather_object(uuid.uuid4().hex)[0]
    with agreed_over(ranks.request):
        parts = take_apart(cache.compressed)
        said = {
            **facts, "format": FORMAT, "save": one, "d2o": cache.d2o.to_dict(), "parallel": ranks.parallel.to_dict(),
            "may_ring": ranks.may_ring, "entries": parts.entries, "on_host": parts.on_host,
        }  # fmt: skip
        memory = {str(number): tensor.cpu() for number, tensor in enumerate(parts.memory)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if count := _others(folder, ranks.request.size):
                raise ValueError(f"{folder} holds a cache that {_ranks(count)} saved: save this one to another folder")
            with replaced(path) as scratch:
                save_file(memory, scratch, metadata={_KEY: json.dumps(said)})
        except (OSError, SafetensorError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            raise ValueError(f"the cache cannot be saved as {path}: {why}") from error


def load(
    folder: str | Path,
    model: nn.Module,
    mesh: ParallelMesh,
    parallel: ParallelConfig | None,
    make: Callable[[D2OConfig, ParallelConfig], ModelCache],
) -> tuple[Any, dict[str, Any], list[nn.Module]]:
    """Read a cache, on all ranks that share it together.

    Args:
        make: an empty cache of the model.

    Returns:
        The cache that was made, filled; the facts it was saved with; the model's attention modules.

    Raises:
        ValueError: no cache, a damaged one, one of another model, of other ranks or of another version of this library;
            on all ranks alike.
    """
    folder, request = Path(folder).expanduser(), Collectives(mesh.axis("request"))
    path = folder / _name(request)
    with agreed_over(request) as fingerprint, _sound(path):
        said = _header(path, request.size)
        sizes = {name: said["parallel"][name] for name in ("tp", "sp")}
        if sizes != {"tp": mesh.tp, "sp": mesh.sp}:
            raise ValueError(
                f"{path} was saved by ranks of tp {sizes['tp']} and sp {sizes['sp']}, and these have tp {mesh.tp} and "
                f"sp {mesh.sp}"
            )
        modules = find_modules(model, said["model"], str(path))
        fingerprint.add("when its part of the cache was saved", said["save"])
        d2o, saved = D2OConfig.from_dict(said["d2o"]), ParallelConfig(**said["parallel"])
    made = make(d2o, saved if parallel is None else parallel)
    with agreed_over(request), _sound(path):
        if parallel is None:
            made.ranks.may_ring = said["may_ring"]
        for name in _SHARING:
            before, now = getattr(saved, name), getattr(made.ranks.parallel, name)
            if before != now:
                raise ValueError(f"{path} was saved by ranks with {name} {before}, and these have {now}")
        device = next(model.parameters()).device
        with safe_open(path, "pt") as file:
            # Copies: what is read may be a view of the file.
            memory = [file.get_tensor(str(number)).to(torch.device("cpu") if on_host else device, copy=True)
                      for number, on_host in enumerate(said["on_host"])]  # fmt: skip
        try:
            put_together(made.compressed, Stored(said["entries"], memory, said["on_host"]))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    return made, said, modules


def _header(path: Path, size: int) -> dict[str, Any]:
    """What a file says beside its tensors."""
    if not path.is_file():
        count = _others(path.parent, size)
        held = f"it holds one that {_ranks(count)} saved, and so many must load it" if count else f"no {path.name}"
        raise ValueError(f"no cache was saved in {path.parent} by {_ranks(size)}: {held}")
    with safe_open(path, "pt") as file:
        said = json.loads((file.metadata() or {})[_KEY])
    if said["format"] != FORMAT:
        raise ValueError(f"{path} is of format {said['format']}, and this version of d2o_dist reads {FORMAT}")
    return said


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """What goes wrong inside, if nobody else knows why, is the fault of the file."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        why = reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged, or no cache: {why}") from error


def _name(request: Collectives) -> str:
    return "cache.safetensors" if request.size == 1 else f"cache-{request.rank + 1}-of-{request.size}.safetensors"


def _others(folder: Path, size: int) -> int | None:
    """How many ranks saved the cache in this folder, if they were not `size`."""
    found = (_FILES.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return next((count for match in found if match and (count := int(match[2] or 1)) != size), None)


def _ranks(count: int) -> str:
    return "one process" if count == 1 else f"{count} ranks"
