"""What a model on disk is, as digests of its files that cost little however large they are.

Small files are read whole. Of large ones the size, the header and some blocks of every tensor are: other weights, or
the same after training, differ everywhere. A change of a few rows inside one tensor may stay unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from d2o_dist.models.adapter_files import base_of
from d2o_dist.models.megatron_files import is_megatron, megatron_paths

# Files up to this size are read whole; of larger ones blocks, in places that follow from the header or the size.
_WHOLE_BYTES, _BLOCK_BYTES, _NUM_BLOCKS = 64 * 2**20, 1024, 512
# A header of safetensors is at most this long.
_HEADER_BYTES = 100_000_000
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors")
# In the order in which transformers looks for them; an index names the files.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def model_digests(name: str, revision: str | None = None) -> dict[str, str]:
    """File name -> digest of everything that what a model computes depends on, its tokenizer aside.

    Args:
        name: folder or hub name. Of the hub's, the commit stands for the weights, which may not be here yet.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        base = base_of(name)
        of_base = {} if base is None else {f"{base}/{file}": one for file, one in model_digests(base).items()}
        return of_base | {path.relative_to(folder).as_posix(): file_digest(path) for path in model_paths(folder)}
    config = Path(cached_file(name, "config.json", revision=revision or "main"))
    return {"config.json": file_digest(config), "commit": config.parent.name}


def tokenizer_digests(name: str) -> dict[str, str]:
    """File name -> digest of the files of a tokenizer; none for a hub name: its rows are compared, as text and ids."""
    return {path.name: file_digest(path) for path in tokenizer_paths(Path(name).expanduser())}


def one_digest(value: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:16]


def model_paths(folder: Path) -> list[Path]:
    """The files of a folder that a model is made from: configuration or arguments, weights, code."""
    if is_megatron(folder):
        return megatron_paths(folder)
    named = _read_json(folder / "config.json").get("transformers_weights")
    names = [named] if isinstance(named, str) else _WEIGHTS
    weights = [name for name in names if (folder / name).is_file()][:1]
    if weights and weights[0].endswith(".index.json"):
        shards = _read_json(folder / weights[0]).get("weight_map")
        weights += sorted(set(shards.values())) if isinstance(shards, dict) else []
    found = [folder / name for name in (*_CONFIGS, *weights)] + sorted(folder.glob("*.py"))
    return [path for path in found if path.is_file()]


def tokenizer_paths(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer is made from."""
    return [folder / name for name in _TOKENIZER if (folder / name).is_file()]


def file_digest(path: Path) -> str:
    """Of the content of a file, or of its size and blocks of it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for start, stop in _blocks(file, size):
            file.seek(start)
            digest.update(file.read(stop - start))
    return digest.hexdigest()


def _blocks(file: Any, size: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of a large file: the header and three blocks of every tensor where it is safetensors."""
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length)) if length <= _HEADER_BYTES else None
        spans = sorted(value["data_offsets"] for key, value in header.items() if key != "__metadata__")
        spans = [(8 + length + int(start), 8 + length + int(stop)) for start, stop in spans]
        yield 0, 8 + length
    except (ValueError, TypeError, KeyError, AttributeError):
        # PyTorch's files are zip archives: the end has a checksum of every tensor.
        spans = [(size * n // _NUM_BLOCKS, size * (n + 1) // _NUM_BLOCKS) for n in range(_NUM_BLOCKS)]
        yield max(0, size - 2**20), size
    for start, stop in spans:
        for at in (start, (start + stop) // 2, max(start, stop - _BLOCK_BYTES)):
            yield at, min(at + _BLOCK_BYTES, stop)


def _read_json(path: Path) -> dict[str, Any]:
    """A mapping in a file; empty where there is none: whoever loads the model says what is wrong."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
