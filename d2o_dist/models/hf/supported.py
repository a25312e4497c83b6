"""Which models a `D2OCache` cannot serve, told from their configuration before anything is computed."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig

from d2o_dist.models.hf.per_layer import of_layers

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# Types of layers that attend, those with a sliding window, those that keep a state of the text, and those that keep
# nothing.
WINDOWED = (SLIDING, "hybrid_sliding")
ATTENTION = (FULL, "hybrid", CHUNKED, *WINDOWED)
STATE = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
NOTHING = ("moe", "mlp")
INSTEAD = "use transformers' own cache, and its attention \"sdpa\" or \"eager\""
# Fields that say so where they are set.
_BY_FIELD = {
    "is_encoder_decoder": "an encoder beside its decoder",
    "add_cross_attention": "cross attention",
    "cross_attention_layers": "cross attention",
    "index_topk": "sparse attention",
}
# What types of layers say.
_BY_LAYER = {
    "indexed_attention": "sparse attention",
    "reference_sliding_attention": "windows that keep the prompt",
}
# What configurations do not tell, by their type.
_BY_TYPE = {
    "blip_text_model": "cross attention",
    "bigbird_pegasus": "causal masks in modules that say they are not causal",
    "diffllama": "differential attention",
    "diffusion_gemma_text": "a decoder that draws many tokens at once, over the keys of another",
    "doge": "a mask for each head",
    "evolla": "a `generate` that reads the text again for each token",
    "git": "attention beside transformers' attention interface",
    "jetmoe": "experts in its attention",
    "kosmos_2_text_model": "masks that it makes itself",
    "moshi": "a sliding window that its masks do not have",
    **dict.fromkeys(("blt", "minimax", "reformer", "xlnet"), "a cache of its own kind"),
    "pi0": "actions for answers, and no text",
    "recurrent_gemma": "states outside its cache",
    **dict.fromkeys(("inkling_text", "inkling2_text"), "biases of relative positions in its attention"),
}

# Types that tell their text which tokens attend to later ones: the mask says it.
_WITH_PREFIX = ("paligemma",)
# Types whose Mamba layers begin anew with each forward of more than one token, in transformers.
_IN_ONE_PIECE = ("jamba", "zamba")
# Types whose layers without keys of their own get the columns of a prompt alone whose logits are asked for.
_CUTTING = ("gemma4_text", "gemma4_unified_text")


def cuts_prompts(config: Any) -> bool:
    """Whether a decoder does so."""
    return config.model_type in _CUTTING


def resumes(config: Any) -> bool:
    """Whether a decoder goes on with its states where a chunk of text, or a later turn, follows what was read."""
    return config.model_type not in _IN_ONE_PIECE


def check_supported(config: Any) -> None:
    """Refuse what a compressed cache cannot serve.

    Raises:
        ValueError: something that is no configuration, or a model that is not supported: names the cause.
    """
    if isinstance(config, nn.Module):
        raise ValueError(f"config is a model ({type(config).__name__}): give D2OCache(config=model.config)")
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config must be a model's configuration (model.config), not {type(config).__name__}")
    if cause := unsupported(config):
        raise ValueError(f"{cause}, which a D2OCache does not support: {INSTEAD}")


def unsupported(config: Any) -> str | None:
    """What a model has that is not supported; None: nothing, as far as its configuration tells."""
    decoder = config.get_text_config(decoder=True)
    cause = _cause(decoder, has_prefix=config.model_type in _WITH_PREFIX)
    if getattr(config, "is_encoder_decoder", False):
        cause = _BY_FIELD["is_encoder_decoder"]
    return None if cause is None else f"{decoder.model_type} has {cause}"


def _cause(config: Any, *, has_prefix: bool) -> str | None:
    if config.model_type in _BY_TYPE:
        return _BY_TYPE[config.model_type]
    for name, what in _BY_FIELD.items():
        if value := next(filter(None, of_layers(config, name)), None):
            return f"{what} ({name} {value})"
    if getattr(config, "num_kv_shared_layers", 0) >= getattr(config, "num_hidden_layers", 1):
        return f"keys and values of another model in all of its layers ({config.num_hidden_layers})"
    if None in of_layers(config, "num_attention_heads"):
        return "no attention layers that its configuration tells of (num_attention_heads)"
    if not has_prefix and getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "tokens that attend to later ones (use_bidirectional_attention)"
    types = getattr(config, "layer_types", None) or (FULL,)
    for index, kind in enumerate(types):
        if kind not in (*ATTENTION, *STATE, *NOTHING):
            return f"{_BY_LAYER.get(kind, 'layers of a kind that is not known')} (layer {index} is of type {kind!r})"
    if not set(ATTENTION) & set(types):
        return f"no layer with attention ({len(types)} layers)"
    known = MODEL_MAPPING.get(type(config), None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    known = known if isinstance(known, (tuple, list)) else [known]
    if (latent := getattr(config, "kv_lora_rank", None)) and not any(map(_caches_latents, known)):
        return f"latent attention (kv_lora_rank {latent}) whose modules do not cache the latent"
    for model in known:
        uses_interface = getattr(model, "_can_set_attn_implementation", None)
        if uses_interface is not None and not uses_interface():
            return f"attention beside transformers' attention interface ({model.__name__})"
    return None


def _caches_latents(model: Any) -> bool:
    """Whether attention of this class of model caches latents, and expands them itself (transformers 5.23)."""
    module = vars(sys.modules.get(getattr(model, "__module__", ""), object))
    return any(hasattr(one, "expand_kv") for one in module.values() if isinstance(one, type))
