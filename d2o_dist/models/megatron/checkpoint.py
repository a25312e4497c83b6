"""Distributed checkpoints of Megatron (torch_dist): which files there are, what they hold, reading and writing.

They are read on any mesh, whatever mesh they were saved on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.safe_globals import register_safe_globals
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from d2o_dist.fields.show import told_by
from d2o_dist.models.megatron.pickles import named_in
from d2o_dist.models.megatron.quiet import quiet
from d2o_dist.models.megatron_files import COMMON, METADATA
from d2o_dist.models.unfit import refuse_keys

# Keys of the model itself; others are of the optimizer, or of heads that predict further tokens.
_OF_MODEL = ("embedding.", "decoder.", "output_layer.")
# Where 0.19 keeps what is no tensor.
_COMMON_STATE = "common_state"
_EMBEDDING = "embedding.word_embeddings.weight"
# What `.metadata` of torch_dist is made of: it is a pickle, and nothing else in it is called.
_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    *(("torch", name) for name in (*_DTYPES, "Size")),
    *((f"{_DCP}.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "_MEM_FORMAT_ENCODING", "StorageMeta",
    )),
    # What Megatron's own writer leaves beside: how the tensors were shared among the ranks that wrote them.
    *((f"{_DCP}.planner", name) for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    )),
    *(("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}  # fmt: skip


def stored_tensors(folder: Path, trusted: bool = False) -> dict[str, TensorStorageMetadata]:
    """Key -> size and dtype of the tensors of a checkpoint; no weights are read.

    Args:
        trusted: whether the pickle may name anything.

    Raises:
        ValueError: it cannot be read, or names what is not of the format.
    """
    path = folder / METADATA
    try:
        if not trusted and (other := named_in(path.read_bytes()) - _KNOWN):
            raise ValueError("it names " + ", ".join(sorted(".".join(one) for one in other)[:3]))
    except ValueError as error:
        raise ValueError(f"{path} is a pickle that was not read, for {error}: if you trust who wrote it, set "
                         "trust_pickled_weights=true") from error  # fmt: skip
    try:
        found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a broken pickle raises
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return {key: one for key, one in found.items() if isinstance(one, TensorStorageMetadata)}


def stored_dtype(tensors: dict[str, TensorStorageMetadata]) -> torch.dtype:
    """Of the weights."""
    return tensors[_EMBEDDING].properties.dtype if _EMBEDDING in tensors else torch.float32


def wanted_tensors(
    model: GPTModel, vocab_size: int, folder: Path, tensors: dict[str, TensorStorageMetadata]
) -> dict[str, Any]:
    """The sharded state dict of this rank's model, in the naming of the checkpoint.

    Args:
        vocab_size: ids that are tokens; the checkpoint and the model may each have more rows.
        tensors: of `stored_tensors`.

    Raises:
        ValueError: keys that are missing there, that the model has no place for, or of another shape.
    """
    register_safe_globals()
    try:
        content = dist_checkpointing.load_content_metadata(str(folder))
    except Exception as error:  # whatever torch.load raises for a pickle that is broken, or holds more than values
        raise ValueError(f"{folder / COMMON} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if content is None:
        each = any(key.startswith("decoder.layers.0.") for key in tensors)
        content = {"non_homogeneous_layers": True} if each else None
    wanted = model.sharded_state_dict(metadata=content)
    # States of Transformer Engine's FP8 are pickles, and nothing that a model of the local spec has.
    wanted = {key: part for key, part in wanted.items() if not isinstance(part, ShardedObject)}
    parts = {part.key: part for part in _parts(wanted)}
    stored = {key: tuple(one.size) for key, one in tensors.items()}
    refuse_keys(
        f"the weights of {folder} do not fit its arguments",
        missing=set(parts) - set(stored),
        unexpected={key for key in set(stored) - set(parts) if key.startswith(_OF_MODEL)},
        other=[
            (key, stored[key], tuple(part.global_shape))
            for key, part in parts.items()
            if key in stored and _differ(stored[key], part, vocab_size)
        ],
    )
    return wanted


def read_weights(model: GPTModel, folder: Path, wanted: dict[str, Any]) -> None:
    """Read what `wanted_tensors` found to be there into the model. All ranks call it together.

    Raises:
        ValueError: on all ranks, if one of them cannot read it.
    """
    try:
        found = dist_checkpointing.load(wanted, str(folder))
    except CheckpointException as error:
        why = next((told_by(failure) for failure, _ in error.failures.values()), "not known")
        raise ValueError(f"the weights of {folder} cannot be read: {why}") from error
    model.load_state_dict({key: found[key] for key in wanted}, strict=False)


def write_weights(model: GPTModel, folder: Path) -> None:
    """Write a checkpoint into an empty folder. All ranks call it together."""
    with quiet():
        dist_checkpointing.save(model.sharded_state_dict(), str(folder), sharded_strategy=_Plain("torch_dist", 1))
    # 0.19 puts what is in this file among the weights, as a pickle that is read unchecked. All versions read the file.
    if dist.get_rank() == 0 and not (folder / COMMON).exists():
        torch.save({}, folder / COMMON)


def _parts(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from _parts({"built": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def _differ(stored: tuple[int, ...], part: ShardedTensor, vocab_size: int) -> bool:
    """Rows of the vocabulary may have been added to divide it."""
    wanted = tuple(part.global_shape)
    fits = part.allow_shape_mismatch and stored[1:] == wanted[1:] and stored[0] >= vocab_size
    return stored != wanted and not fits


class _Plain(TorchDistSaveShardedStrategy):
    """Megatron's own writer starts processes and counts failures on a GPU; this is PyTorch's, of the same tensors."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write all parts, those of the main replicas, and return when they are written."""
        found: dict[str, list[ShardedBase]] = {}
        for part in nested_values(sharded_state_dict):
            if is_main_replica(part.replica_id) and part.key != _COMMON_STATE:
                key = part.unique_key if isinstance(part, ShardedObject) else part.key
                found.setdefault(key, []).append(part)
        planner = MCoreSavePlanner(flatten_state_dict=False)
        dcp.save(
            mcore_to_pyt_state_dict(found), storage_writer=dcp.FileSystemWriter(checkpoint_dir), planner=planner
        )
