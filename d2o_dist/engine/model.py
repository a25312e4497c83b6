"""Loading: first configuration and tokenizer, which cost nothing; the weights when all else is known to be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from d2o_dist.comm.launch import read_environment
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.adapter import base_of, merge_adapter
from d2o_dist.engine.agreement import agreed
from d2o_dist.engine.checkpoint import check_keys, without_report
from d2o_dist.integrations.hf.guards import ATTENTION_NAME, text_config
from d2o_dist.integrations.tensor_parallel import shard_model


def load_config(config: InferConfig) -> Any:
    """The model's configuration.

    Raises:
        ValueError: the folder is missing or has no usable `config.json`, or the hub does not have the model.
    """
    return _load("configuration", AutoConfig, base_of(config.model) or config.model, **_hub(config))


def load_tokenizer(config: InferConfig) -> Any:
    """The tokenizer.

    Raises:
        ValueError: there is none.
    """
    own = config.tokenizer is None or config.tokenizer == config.model
    hub = _hub(config) if own else {"trust_remote_code": config.trust_remote_code}
    name = config.tokenizer or config.model
    # peft leaves the tokenizer with the base, a trainer of adapters saves it beside the adapter.
    if (base := base_of(name)) and not (Path(name).expanduser() / "tokenizer_config.json").exists():
        name = base
    return _load("tokenizer", AutoTokenizer, name, **hub)


def load_model(config: InferConfig, mesh: ParallelMesh | None = None) -> Any:
    """The model with its weights, on its device, in evaluation mode, attending through `d2o`.

    Args:
        mesh: with tp > 1 every rank reads the whole checkpoint and keeps its shard; every rank of the mesh calls.

    Raises:
        ValueError: the weights, or some of their keys, are missing or do not fit the configuration, on this rank or
            another.
    """
    mesh = ParallelMesh.local() if mesh is None else mesh
    # Sharding is collective: either all ranks have the weights, or none goes on.
    with agreed(mesh):
        device = pick_device(config.device)
        model = _load_whole(config, device)
    return shard_model(model, mesh, config.parallel, device).eval().requires_grad_(False)


def _load_whole(config: InferConfig, device: torch.device) -> Any:
    """The whole model on the CPU, in the dtype for `device`."""
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if dtype == "auto" and device.type == "cpu" and load_config(config).dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    base = base_of(config.model)
    with without_report():
        # Shapes that differ are told like all other keys that do not fit.
        model, found = _load(
            "weights", AutoModelForCausalLM, base or config.model, dtype=dtype, attn_implementation=ATTENTION_NAME,
            output_loading_info=True, ignore_mismatched_sizes=True, **_hub(config),
        )  # fmt: skip
    check_keys(base or config.model, found)
    return model if base is None else merge_adapter(model, config.model)


def pick_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means; of several ranks, each has the GPU of its local rank.

    Raises:
        ValueError: a CUDA device that this machine does not have, or one by number for several ranks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    device, launch = torch.device(name), read_environment()
    if device.type == "cuda" and launch.world_size > 1:
        if device.index is not None:
            raise ValueError(f"device ({name}) is one GPU for {launch.world_size} ranks: use auto or cuda")
        device = torch.device("cuda", launch.local_rank)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device ({device}) is not there: this machine has {count} CUDA devices")
    return device


def max_positions(model_config: Any) -> int | None:
    """Tokens the model has positions for; None where its configuration does not say."""
    return getattr(text_config(model_config), "max_position_embeddings", None)


def vocab_size(model_config: Any) -> int | None:
    """Token ids the model has embeddings for; None where its configuration does not say."""
    return getattr(text_config(model_config), "vocab_size", None)


def pad_id(tokenizer: Any) -> int:
    """The id that fills shorter rows. Masked everywhere, so a tokenizer without one may use any."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: the generation configuration's (one or a list), and the tokenizer's."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(found) if isinstance(found, (list, tuple)) else [found]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _hub(config: InferConfig) -> dict[str, Any]:
    return {"trust_remote_code": config.trust_remote_code, "revision": config.revision or "main"}


def _load(what: str, auto: Any, name: str, **kwargs: Any) -> Any:
    path = Path(name).expanduser()
    # A hub name is `name` or `owner/name`; anything else can only be a folder.
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not path.is_dir() and (is_path or path.exists()):
        raise ValueError(f"model folder {name} {'is not a folder' if path.exists() else 'does not exist'}")
    try:
        return auto.from_pretrained(str(path) if path.is_dir() else name, **kwargs)
    except torch.OutOfMemoryError:
        raise
    # transformers and safetensors raise whatever they meet; their first line says what.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"the {what} of {name} cannot be loaded: {reason}") from error
