"""What of Hugging Face transformers the integration relies on, and what it refuses. All version checks live here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor, nn

from d2o_dist.models.hf.per_layer import of_each_layer
from d2o_dist.models.hf.supported import ATTENTION, CHUNKED, FULL, SLIDING, STATE, WINDOWED
from d2o_dist.slots.windows import Chunked, Window

MINIMUM = "5.17"
ATTENTION_NAME = "d2o"
# Arguments of an attention function that change nothing in what it computes. Windows and documents are in the mask.
HARMLESS = frozenset({
    "position_ids", "sliding_window", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "num_items_in_batch", "logits_to_keep", "deterministic",
})  # fmt: skip


def check_version() -> None:
    """Raise `ImportError` when transformers is older than what the cache interface needs."""
    if Version(transformers.__version__) < Version(MINIMUM):
        raise ImportError(f"d2o_dist needs transformers >= {MINIMUM}, found {transformers.__version__}")


def text_config(config: Any) -> Any:
    """The configuration of the decoder: of a composite model its text part."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def latent_dim(config: Any) -> int | None:
    """Elements of the latent that a decoder with latent attention caches of a token; None: it has no such attention."""
    return getattr(config, "kv_lora_rank", None)


def layer_types(config: Any) -> list[str]:
    """Per layer of a decoder its type, as transformers names it.

    Raises:
        ValueError: layers that are not as many as their types.
    """
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is None:
        types = [SLIDING if window else FULL for window in of_each_layer(config, "sliding_window")]
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries, but num_hidden_layers is {count}")
    return list(types)


def layer_windows(config: Any) -> list[Window | None]:
    """Per layer with attention None (full attention) or its window; of a decoder that is supported.

    Raises:
        ValueError: layers that are not as many as their types, or windows without a size.
    """
    types, sizes = layer_types(config), of_each_layer(config, "sliding_window")
    return [_window(config, types[index], sizes[index]) for index in attending(config)]


def attending(config: Any) -> list[int]:
    """Layers that attend to keys of their own."""
    others = sharers(config)
    return [index for index, kind in enumerate(layer_types(config)) if kind in ATTENTION and index not in others]


def sharers(config: Any) -> dict[int, int]:
    """Of each layer without keys of its own the layer whose keys and values it attends to."""
    if not getattr(config, "num_kv_shared_layers", 0):
        return {}
    types, modes = layer_types(config), config.kv_sharing_modes
    owners = {types[index]: index for index, mode in enumerate(modes) if mode == "store"}
    return {index: owners[types[index]] for index, mode in enumerate(modes) if mode == "reuse"}


def _window(config: Any, kind: str, slides: int | None) -> Window | None:
    """Of a layer of this type, whose window is `slides`, if it slides."""
    if kind == CHUNKED:
        return chunks_of_config(config)
    if kind in WINDOWED and not slides:
        raise ValueError(f"{config.model_type}: layer_types has {kind}, but sliding_window is {slides}")
    return slides if kind in WINDOWED else None


def chunks_of_config(config: Any) -> Chunked:
    """Those of its layers with chunks.

    Raises:
        ValueError: it does not say how long they are.
    """
    size = getattr(config, "attention_chunk_size", None)
    if not size:
        raise ValueError(f"{config.model_type}: layer_types has {CHUNKED}, but attention_chunk_size is {size}")
    return Chunked(size)


def chunks_of(module: nn.Module) -> Chunked | None:
    """Those that an attention module of a decoder attends in; None: it does not, as far as its configuration tells."""
    config, number = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    return chunks_of_config(config) if types and number is not None and types[number] == CHUNKED else None


def state_counts(config: Any) -> list[int]:
    """Per layer how many states it keeps beside tokens or instead of them; 0: none."""
    count = getattr(config, "number_of_conv_states", 1)
    return [count if kind in STATE else 0 for kind in layer_types(config)]


def rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding of the decoder's layers, such as `default` or `dynamic`."""
    rules = getattr(text_config(config), "rope_parameters", None) or {}
    found = [rules, *(rule for rule in rules.values() if isinstance(rule, dict))]
    return {rule["rope_type"] for rule in found if "rope_type" in rule}


def check_attention(config: Any) -> None:
    """Refuse a model whose attention is not `d2o`.

    Raises:
        ValueError: names the attention the model was loaded with.
    """
    name = getattr(config, "_attn_implementation", None)
    if name is not None and name != ATTENTION_NAME:
        raise ValueError(
            f'the model\'s attention is "{name}", but D2OCache needs "{ATTENTION_NAME}": load it with '
            f'from_pretrained(..., attn_implementation="{ATTENTION_NAME}") or call '
            f'model.set_attn_implementation("{ATTENTION_NAME}")'
        )


def check_arguments(kwargs: dict[str, Any], honoured: Iterable[str], who: str) -> None:
    """Refuse arguments of an attention function that would be dropped: they may change what it should compute.

    Args:
        honoured: names that are computed with; who: what does not know the others.

    Raises:
        ValueError: names the arguments.
    """
    for name, value in kwargs.items():
        if value is not None and name not in HARMLESS and name not in honoured:
            shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"the model's attention has {name} ({shown}), which {who} does not support")
