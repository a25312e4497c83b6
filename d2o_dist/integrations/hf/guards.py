"""What of Hugging Face transformers the integration relies on, and what it refuses. All version checks live here."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

MINIMUM = "5.17"
ATTENTION_NAME = "d2o"
FULL, SLIDING = "full_attention", "sliding_attention"


def check_version() -> None:
    """Raise `ImportError` when transformers is older than what the cache interface needs."""
    if Version(transformers.__version__) < Version(MINIMUM):
        raise ImportError(f"d2o_dist needs transformers >= {MINIMUM}, found {transformers.__version__}")


def text_config(config: Any) -> Any:
    """The configuration of the decoder: of a composite model its text part."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def layer_windows(config: Any) -> list[int | None]:
    """Per layer None (full attention) or its sliding window.

    Raises:
        ValueError: encoder-decoder models, layers that share keys and values, or layers of another kind.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type}: encoder-decoder models are not supported, only decoders")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"{config.model_type}: layers that share keys and values are not supported")
    count = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = [SLIDING if window else FULL] * count
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries, but num_hidden_layers is {count}")
    for index, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            raise ValueError(f"{config.model_type}: layer {index} is of type {kind!r}; only {FULL} and {SLIDING} are "
                             "supported")  # fmt: skip
    if SLIDING in types and not window:
        raise ValueError(f"{config.model_type}: layer_types has {SLIDING}, but sliding_window is {window}")
    return [window if kind == SLIDING else None for kind in types]


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


def check_plain_softmax(kwargs: dict[str, Any]) -> None:
    """Refuse attention that is not a plain softmax.

    Raises:
        ValueError: soft-capped logits or learned sinks.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name} ({kwargs[name]}) is not supported by d2o")
