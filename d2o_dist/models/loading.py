"""From the name of a model to the model: what the rest of the library asks, whatever library the model is from."""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.models.base import ModelAdapter
from d2o_dist.models.hf import loading as hf
from d2o_dist.models.hf.model import HFModel
from d2o_dist.models.megatron_files import is_megatron
from d2o_dist.models.shape import ModelShape

load_tokenizer, quiet = hf.load_tokenizer, hf.quiet


def describe(config: InferConfig) -> ModelShape:
    """What can be known of the model without its weights.

    Raises:
        ValueError: there is no such model, or it cannot be compressed or be divided among the tensor ranks.
    """
    return _library(config).describe(config)


def versions() -> list[tuple[str, str | None]]:
    """Name and version of each library that models come from; None: it is not installed."""
    return [(name, _version(name)) for name in ("transformers", "megatron-core")]


def load_model(config: InferConfig, mesh: ParallelMesh | None = None) -> ModelAdapter:
    """The model with its weights, on its device, in evaluation mode.

    Args:
        mesh: with tp > 1 every rank reads the whole checkpoint and keeps its shard; every rank of the mesh calls.

    Raises:
        ValueError: the weights, or some of their keys, are missing or do not fit the configuration, on this rank or
            another.
    """
    return _library(config).load_model(config, ParallelMesh.local() if mesh is None else mesh)


def adapt(model: Any) -> ModelAdapter:
    """The adapter of a model that was loaded already; of an adapter, itself."""
    if isinstance(model, ModelAdapter):
        return model
    if any(kind.__module__.startswith("megatron.") for kind in type(model).__mro__):
        from d2o_dist.models.megatron import MegatronModel

        return MegatronModel(model)
    return HFModel(model)


def pad_id(tokenizer: Any) -> int:
    """The id that fills shorter rows. Masked everywhere, so a tokenizer without one may use any."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def eos_ids(model: ModelAdapter, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: the model's and the tokenizer's."""
    return model.eos_ids | {i for i in [tokenizer.eos_token_id] if i is not None}


def check_kind(config: InferConfig) -> None:
    """Refuse a folder that says it is of another library than the configuration does.

    Raises:
        ValueError: names both.
    """
    if config.model_kind == "transformers" and is_megatron(Path(config.model).expanduser()):
        raise ValueError(f"model folder {config.model} holds a Megatron checkpoint: set model_kind=megatron")


def megatron_library() -> Any:
    """The module that loads Megatron's models, imported when it is needed: it takes seconds.

    Raises:
        ValueError: megatron-core is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optional packages that are not there
            from d2o_dist.models.megatron import loading
    except ModuleNotFoundError as error:
        raise ValueError(f"a Megatron model needs megatron-core ({error}): pip install 'd2o_dist[megatron]'") from error
    return loading


def _library(config: InferConfig) -> Any:
    """The module that describes and loads the model."""
    check_kind(config)
    return hf if config.model_kind == "transformers" else megatron_library()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
