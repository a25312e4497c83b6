"""Loading a Megatron model: first its arguments, which cost nothing; the weights when all else is known to be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.megatron import MegatronArguments
from d2o_dist.models.device import pick_device
from d2o_dist.models.megatron.build import build_gpt
from d2o_dist.models.megatron.checkpoint import read_weights, stored_dtype, stored_tensors, wanted_tensors
from d2o_dist.models.megatron.families import config_of
from d2o_dist.models.megatron.model import MegatronModel
from d2o_dist.models.megatron.quiet import quiet
from d2o_dist.models.megatron.ranks import join
from d2o_dist.models.megatron_files import COMMON, weights_folder
from d2o_dist.models.shape import ModelShape


def describe(config: InferConfig) -> ModelShape:
    """The shape of the model on the mesh of `config.parallel`, from its arguments.

    Raises:
        ValueError: no such folder, or files of it are missing; arguments that are unknown, or that the tensor ranks
            cannot divide; pickles that nobody trusts.
    """
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        raise ValueError(f"model folder {config.model} {'is not a folder' if folder.exists() else 'does not exist'}")
    arguments = MegatronArguments.load(folder)
    if not (weights_folder(folder) / COMMON).is_file() and not config.trust_pickled_weights:
        raise ValueError(
            f"{folder} has no {COMMON}: newer versions of Megatron keep it as a pickle among the weights, and read it "
            "unchecked. If you trust who wrote it, set trust_pickled_weights=true"
        )
    _check_sizes(arguments, config)
    return shape_of(arguments, config.parallel.tp)


def shape_of(arguments: MegatronArguments, tp: int) -> ModelShape:
    """The shape of the model on so many tensor ranks."""
    return ModelShape(
        windows=arguments.windows,
        num_heads=arguments.num_attention_heads,
        num_kv_heads=arguments.query_groups,
        head_dim=arguments.head_dim,
        kv_replicas=max(1, tp // arguments.query_groups),
        vocab_size=arguments.vocab_size,
        max_positions=arguments.max_sequence_length,
    )


def load_model(config: InferConfig, mesh: ParallelMesh) -> MegatronModel:
    """The model with its weights; see `models.loading.load_model`."""
    with quiet():
        return _load(config, mesh)


def config_of_model(config: InferConfig) -> Any:
    """The configuration of a Hugging Face model of the same sizes, with the dtype of the weights.

    Raises:
        ValueError: see `describe` and `families.config_of`.
    """
    describe(config)
    folder = Path(config.model).expanduser()
    found = config_of(MegatronArguments.load(folder))
    found.dtype = stored_dtype(stored_tensors(weights_folder(folder), config.trust_pickled_weights))
    return found


def _load(config: InferConfig, mesh: ParallelMesh) -> MegatronModel:
    folder = Path(config.model).expanduser()
    with agreed(mesh):
        device, shape = pick_device(config.device), describe(config)
        arguments, weights = MegatronArguments.load(folder), weights_folder(folder)
        tensors = stored_tensors(weights, config.trust_pickled_weights)
        dtype = _dtype(config, device, stored_dtype(tensors))
    join(mesh, config.parallel.timeout)
    with agreed(mesh):
        model = build_gpt(arguments, params_dtype=dtype, perform_initialization=False).to(device)
        wanted = wanted_tensors(model, arguments.vocab_size, weights, tensors)
    read_weights(model, weights, wanted)
    adapter = MegatronModel(model.eval().requires_grad_(False), arguments.vocab_size, arguments.eos_token_ids)
    assert adapter.shape == shape, (adapter.shape, shape)
    return adapter


def _dtype(config: InferConfig, device: torch.device, stored: torch.dtype) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if device.type == "cpu" and stored in (torch.bfloat16, torch.float16) else stored


def _check_sizes(arguments: MegatronArguments, config: InferConfig) -> None:
    """What `ModelShape` does not know: the MLP, experts, and KV heads that are fewer than ranks."""
    tp, groups = config.parallel.tp, arguments.query_groups
    wide = {
        "num_attention_heads": arguments.num_attention_heads,
        "ffn_hidden_size": arguments.ffn_hidden_size or 4 * arguments.hidden_size,
        "moe_ffn_hidden_size": arguments.moe_ffn_hidden_size or tp,
        "moe_shared_expert_intermediate_size": arguments.moe_shared_expert_intermediate_size or tp,
    }
    for name, size in wide.items():
        if size % tp:
            raise ValueError(f"{name} ({size}) must be divisible by tp ({tp})")
    if groups % tp and tp % groups:
        raise ValueError(f"num_query_groups ({groups}) must be divisible by tp ({tp}), or divide it")
    if arguments.num_moe_experts and tp > 1 and pick_device(config.device).type == "cpu":
        raise ValueError(f"tp ({tp}) must be 1 on a CPU with num_moe_experts ({arguments.num_moe_experts}): Megatron "
                         "gathers the tokens of experts on a GPU")  # fmt: skip
