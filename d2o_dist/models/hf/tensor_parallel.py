"""Tensor parallelism of Hugging Face models: what divides, copies of KV heads, and sharding by transformers' own plan.

The engines cut the projections of a layer into runs of whole heads: rank r of n holds query heads r Hq/n .. (r+1) Hq/n
and KV heads r Hkv/n .. (r+1) Hkv/n. Where there are fewer KV heads than ranks, each is first repeated n / Hkv times in
place, so that the same cut gives rank r a copy of head r // (n / Hkv): the one its query heads belong to. Latent
attention has one KV head, the latent, which every rank computes: what queries and output make of it is cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from d2o_dist.comm.adapters import to_device_mesh
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.models.hf.guards import latent_dim, sharers, state_counts, text_config
from d2o_dist.models.hf.quantised import quant_method
from d2o_dist.models.hf.shape import layer_heads

_HEAD_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Of latent attention, what transformers' plans say where they say it; those of many types leave attention whole.
_OF_LATENTS = {"q_proj": "colwise", "q_b_proj": "colwise", "kv_b_proj": "colwise", "o_proj": "rowwise"}


def kv_replicas(config: Any, tp: int) -> int:
    """How many of `tp` ranks share each KV head: 1 where there are enough of them.

    Raises:
        ValueError: query heads that do not divide among the ranks, or KV heads of which neither ranks nor heads are a
            multiple; layers of several head counts where heads would be copied.
    """
    counts = layer_heads(config)
    for heads, kv_heads in counts:
        if heads % tp:
            raise ValueError(f"num_attention_heads ({heads}) must be divisible by tp ({tp})")
        if kv_heads % tp and tp % kv_heads:
            raise ValueError(
                f"num_key_value_heads ({kv_heads}) must be divisible by tp ({tp}), or tp by num_key_value_heads"
            )
    fewest = min(kv_heads for _, kv_heads in counts)
    if len(counts) > 1 and fewest < tp:
        raise ValueError(
            f"tp ({tp}) is more than the {fewest} KV heads of some layers, and other layers have other heads, so that "
            f"they cannot be copied: use {_other_axis(config)}"
        )
    return max(1, tp // fewest)


def check_not_quantised(config: Any, tp: int) -> None:
    """Refuse weights that are packed, as a quantised checkpoint's are: no engine cuts those by heads.

    Raises:
        ValueError: names the method of quantisation.
    """
    method = quant_method(config)
    if method is not None:
        raise ValueError(
            f"tp ({tp}) cannot shard quantised weights (quant_method {method}): use {_other_axis(config)} instead"
        )


def check_separate_projections(config: Any) -> None:
    """Refuse models that pack queries, keys and values in one projection: no engine cuts those by heads.

    Raises:
        ValueError: the model has no plan of its own, or one that does not give each rank its own heads.
    """
    config = text_config(config)
    if latent_dim(config) is not None:
        if any(state_counts(config)):
            raise ValueError(
                f"tp cannot cut {config.model_type}: its layers of linear attention have projections of the same names "
                f"as those of latent attention: use {_other_axis(config)} instead"
            )
        return
    plan = getattr(config, "base_model_tp_plan", None) or {}
    found = {name.rsplit(".", 1)[-1]: style for name, style in plan.items() if ".self_attn." in name}
    wrong = [name for name in _HEAD_PROJECTIONS if found.get(name) != "colwise"]
    if wrong:
        plan = ", ".join(f"{name} ({style})" for name, style in found.items()) or "no tensor parallel plan"
        raise ValueError(
            f"tp needs a model whose {', '.join(_HEAD_PROJECTIONS)} are separate and cut by heads, so that every rank "
            f"has heads of its own; {config.model_type} has {plan}: use {_other_axis(config)} instead"
        )


def check_engine(config: Any, engine: str) -> None:
    """Refuse an engine that does not know layers that keep a state or share keys, or latents: DeepSpeed cuts whatever
    looks like a projection.

    Raises:
        ValueError: names the engine that does.
    """
    if engine == "deepspeed" and latent_dim(text_config(config)) is not None:
        raise ValueError(
            "tp_engine (deepspeed) was never tried with latent attention, of which some projections must stay whole: "
            "use tp_engine transformers"
        )
    if engine == "deepspeed" and any(state_counts(text_config(config))):
        raise ValueError(
            "tp_engine (deepspeed) cannot cut layers that keep a state (linear attention, Mamba, convolutions): use "
            "tp_engine transformers"
        )
    if engine == "deepspeed" and sharers(text_config(config)):
        raise ValueError(
            "tp_engine (deepspeed) was not made for layers that share keys and values: use tp_engine transformers"
        )


def _other_axis(config: Any) -> str:
    """What shares a request, or the requests, where tensor ranks cannot."""
    config = text_config(config)
    return "dp" if any(state_counts(config)) or sharers(config) else "sp"


def repeat_kv_heads(model: nn.Module, replicas: int) -> None:
    """Repeat every KV head `replicas` times in place, so that Hkv x replicas heads compute what Hkv did.

    Weights and biases of all `k_proj` and `v_proj`; norms per head (Qwen3) are shared by all heads as they are. The
    configuration is changed too: `num_key_value_heads` counts the copies.

    Raises:
        ValueError: a layer with another number of KV heads.
    """
    config = text_config(model.config)
    ((_, old),) = layer_heads(config)
    for module in model.modules():
        if not all(isinstance(getattr(module, name, None), nn.Linear) for name in _HEAD_PROJECTIONS):
            continue
        own = config.num_attention_heads // getattr(module, "num_key_value_groups", config.num_attention_heads // old)
        if own != old:
            raise ValueError(
                f"num_key_value_heads ({old}) are fewer than tensor ranks, and a layer has {own} KV heads: use sp"
            )
        for projection in (module.k_proj, module.v_proj):
            for name, parameter in list(projection.named_parameters(recurse=False)):
                heads = parameter.data.unflatten(0, (old, -1)).repeat_interleave(replicas, 0).flatten(0, 1)
                setattr(projection, name, nn.Parameter(heads, requires_grad=parameter.requires_grad))
            projection.out_features *= replicas
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups //= replicas
    config.num_key_value_heads = old * replicas


def check_version() -> None:
    """Raises ValueError unless this version of transformers has what `shard_with_transformers` builds on."""
    try:
        from transformers.distributed import DistributedConfig  # noqa: F401
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # noqa: F401

        PreTrainedModel._resolve_parallel_plans  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"tp_engine (transformers) was written for transformers 5.23, and this version differs ({error}): use "
            "tp_engine deepspeed"
        ) from error


def shard_with_transformers(model: Any, mesh: ParallelMesh, device: torch.device) -> Any:
    """Keep this rank's shard of a loaded model, by the plan that transformers has for it; parameters become DTensors.

    `from_pretrained(tp_plan=...)` would make a mesh of its own over all ranks. Here the plan is applied to loaded
    weights, on the tp axis of a mesh that may have other axes: nothing is sent.

    Args:
        model: on the CPU; device: where its shard goes.
    """
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    settings = DistributedConfig(tp_size=mesh.tp, tp_plan=_latent_plan(model) or "auto")
    plan, _, _ = model._resolve_parallel_plans(settings)
    model._tp_size = mesh.tp
    with _untied(model):
        model = apply_tensor_parallelism(model, to_device_mesh(mesh, "tp", device.type), plan)
    return model.to(device)


def _latent_plan(model: nn.Module) -> dict[str, str]:
    """What is added to the model's own plan: how projections of latent attention are cut by heads, by their names in
    the model, with a * for the number of the layer."""
    return {
        re.sub(r"\.\d+(?=\.)", ".*", f"{name}.{part}"): style
        for name, module in model.named_modules() if hasattr(module, "expand_kv")
        for part, style in _OF_LATENTS.items() if isinstance(getattr(module, part, None), nn.Linear)
    }  # fmt: skip


@contextmanager
def _untied(model: nn.Module) -> Iterator[None]:
    """Weights that two modules share (embedding and output head) as two, and one again where both are cut alike.

    The plan names each, and a shared parameter answers to one name only.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    shared = [places for places in owners.values() if len(places) > 1]
    for (first, name), *others in shared:
        shared_weight = getattr(first, name)
        for module, other in others:
            setattr(module, other, nn.Parameter(shared_weight.data, shared_weight.requires_grad))
    yield
    for (first, name), *others in shared:
        kept = getattr(first, name)
        for module, other in others:
            if getattr(getattr(module, other), "placements", None) == getattr(kept, "placements", None):
                setattr(module, other, kept)
