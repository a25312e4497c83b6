"""Which model filled a cache: fields of its configuration, and digests of its attention modules' weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2o_dist.models.digest import one_digest
from d2o_dist.models.hf.guards import text_config

# Elements of each tensor that a digest looks at, spread evenly.
_ELEMENTS = 64
# Fields that change nothing in what the decoder computes.
_FREE = frozenset({
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id",
    "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "quantization_config",
    "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip


def describe_model(config: Any, modules: Iterable[nn.Module]) -> dict[str, Any]:
    """What a file says of the model, as plain values.

    Args:
        modules: the attention module of each layer, in order.
    """
    fields = {
        name: value
        for name, value in text_config(config).to_dict().items()
        if not name.startswith("_") and name not in _FREE
    }
    attention = [[type(module).__name__, *_digest(module)] for module in modules]
    fields = json.loads(json.dumps(fields, default=str))  # as a file has them
    return {"config": fields, "digest": one_digest(fields), "attention": attention}


def find_modules(model: nn.Module, said: Mapping[str, Any], where: str) -> list[nn.Module]:
    """The attention modules of a model that must be the one that `describe_model` saw, on this rank.

    A field that only one of two versions of transformers has says nothing.

    Args:
        said: its result; where: the file that says it.

    Raises:
        ValueError: another configuration, or other weights; names the field, or the layer, and the digests.
    """
    names = {name for name, _, _ in said["attention"]}
    there = [module for module in model.modules() if type(module).__name__ in names]
    here = describe_model(model.config, there)
    for field, value in said["config"].items():
        if field in here["config"] and here["config"][field] != value:
            raise ValueError(
                f"{where} was saved from another model: its {field} is {value}, of this model {here['config'][field]} "
                f"(digests of the configurations {said['digest']} and {here['digest']})"
            )
    found = []
    for layer, (name, dtype, digest) in enumerate(said["attention"]):
        match = [module for module, other in zip(there, here["attention"], strict=True)
                 if other == [name, dtype, digest] and getattr(module, "layer_idx", layer) == layer]  # fmt: skip
        if not match:
            others = sorted({other[1] for other in here["attention"]})
            if others and dtype not in others:
                raise ValueError(f"{where} was saved from a model in {dtype}, and this one is in {', '.join(others)}")
            raise ValueError(
                f"{where} was saved from another model: the weights of layer {layer} ({name}) differ (digests of all "
                f"layers' attention {one_digest(said['attention'])} and {one_digest(here['attention'])})"
            )
        found.append(match[0])
    return found


def _digest(module: nn.Module) -> tuple[str, str]:
    """The dtype of a module's first weight, and a digest of some elements of all of them."""
    digest, dtype = hashlib.sha256(), ""
    # Not `state_dict`: some libraries of quantised weights lay them out otherwise when it is asked for.
    for name, value in module.named_parameters():
        for tensor in _plain(value):
            flat = tensor.detach().reshape(-1)
            dtype = dtype or str(flat.dtype).removeprefix("torch.")
            index = torch.linspace(0, max(len(flat) - 1, 0), min(_ELEMENTS, len(flat)), device=flat.device).long()
            digest.update(f"{name} {tuple(tensor.shape)} {flat.dtype}".encode())
            digest.update(flat[index].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return dtype, digest.hexdigest()[:16]


def _scales(state: Any) -> Tensor:
    """[n] the scales of a weight of bitsandbytes in 4 bits, ascending, of which the first forward on a CPU changes the
    order, the dtype and that of the weight's own bits."""
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.flatten().to(torch.bfloat16).sort().values


def _plain(value: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that a weight is made of: this rank's shard, the parts of a quantised one."""
    if getattr(value, "quant_state", None) is not None:
        yield _scales(value.quant_state)
    elif hasattr(value, "to_local"):
        yield from _plain(value.to_local())
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    else:
        yield value
