"""Tiny random models of any type that transformers has, and whether `d2o` attention computes what `sdpa` does.

`python -m tests.families [TYPE ...]` prints a line for each class; without names, for those of all types.
"""

from __future__ import annotations

import inspect
import itertools
import random
import signal
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel

VOCABULARY = 99
LENGTH = 12
PADDED = 4
LARGEST = 20_000_000
# `eager` takes its softmax in float32 in many models, also of a float64 model.
TOLERANCE = {("sdpa", torch.float64): 1e-9, ("eager", torch.float64): 1e-5, ("sdpa", torch.float32): 1e-4,
             ("eager", torch.float32): 1e-4}  # fmt: skip
# Every field that a configuration has is set to these. Weights are large, so that attention is far from uniform.
SMALL: dict[str, Any] = {
    **dict.fromkeys("hidden_size d_model n_embd embed_dim dim encoder_hidden_size embedding_size text_embed_dim "
                    "projection_dim out_hidden_size text_hidden_size".split(), 32),
    **dict.fromkeys("intermediate_size intermediate_size_mlp ffn_dim d_ff n_inner encoder_ffn_dim "
                    "decoder_ffn_dim".split(), 48),
    **dict.fromkeys("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers depth "
                    "num_decoder_layers".split(), 2),
    **dict.fromkeys("num_attention_heads num_heads n_head n_heads encoder_attention_heads "
                    "decoder_attention_heads".split(), 4),
    **dict.fromkeys("max_position_embeddings n_positions max_source_positions max_target_positions".split(), 64),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 24),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 4),
    **dict.fromkeys("initializer_range init_std".split(), 0.3),
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), VOCABULARY),
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "rotary_dim": 4, "initializer_factor": 2.0,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "image_size": 16, "patch_size": 4, "sliding_window": 5, "attention_chunk_size": 5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "image_token_id": 97, "image_token_index": 97, "video_token_id": 96, "audio_token_id": 95,
    "vision_start_token_id": 94, "vision_end_token_id": 93, "boi_token_index": 92, "eoi_token_index": 91,
    "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 2, "index_topk_blocks": 2,
    "index_local_blocks": 1, "hidden_size_per_layer_input": 8,
    "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16, "ssm_state_size": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 8, **dict.fromkeys("linear_key_head_dim linear_value_head_dim".split(), 8),
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_LATENT = ("head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
# Fields left as they are, and others set: the first that a type can be made and run with is taken.
VARIANTS: tuple[tuple[Collection[str], dict[str, Any]], ...] = (
    ((), {}),
    (("head_dim",), {"num_key_value_heads": 4}),
    (_LATENT, {"num_key_value_heads": 4}),
    ((*_LATENT, "num_key_value_heads", "image_size", "patch_size", "num_heads", "embed_dim"), {}),
    # Of models in parts that read these from the whole, which has no such field.
    ((), {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1,
          "vision_start_token_id": 94, "vision_end_token_id": 93, "head_dim": 8}),
)


def tiny_config(kind: type, changes: dict[str, Any] | None = None, leave: Collection[str] = ()) -> Any:
    """A configuration of this class, made small, its parts too.

    Args:
        changes: of the outermost one and of its parts, or under the name of a part, of that one alone.
        leave: fields that stay as they are.
    """
    changes, parts = changes or {}, getattr(kind, "sub_configs", {})
    # Some parts are of another type, or not valid, as they are by default.
    default = kind(**{name: changes[name] for name in parts if name in changes})
    fields = default.to_dict()
    small = {name: value for name, value in {**SMALL, **changes}.items() if fields.get(name) is not None}
    small = {name: value for name, value in small.items() if name not in leave or name in changes}
    for name, value in small.items():  # one for each stage, or each side of an image
        if isinstance(fields[name], (list, tuple)) and isinstance(value, int):
            small[name] = [value] * len(fields[name])
    small |= {} if "layer_types" in changes else _layers(fields)
    inside = {name: value for name, value in changes.items() if name not in parts}
    for name in parts:
        part = getattr(default, name, None)
        if part is not None:
            small[name] = tiny_config(type(part), {**inside, **changes.get(name, {})}, leave).to_dict()
    sections = (fields.get("rope_parameters") or {}).get("mrope_section") if "rope_parameters" in fields else None
    if sections:
        small["rope_parameters"] = {**fields["rope_parameters"], "mrope_section": [2, 1, 1]}
    return kind(**{**small, **{name: value for name, value in changes.items() if name not in small}})


def _layers(fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, two at least: the fields that say something of every layer."""
    kinds = fields.get("layer_types")
    if not kinds:
        return {}
    first = sorted(set(map(kinds.index, kinds))) if len(set(kinds)) > 1 else [0, 1]
    lists = {name: [value[i] for i in first] for name, value in fields.items()
             if isinstance(value, list) and len(value) == len(kinds)}  # fmt: skip
    return {**lists, "num_hidden_layers": len(first)}


def build(
    model_class: type[PreTrainedModel], config: Any, attention: str, dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """A model in evaluation mode, always with the same weights; a copy of `config` is changed.

    Raises:
        whatever the model raises when it does not have this attention.
    """
    config = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise RuntimeError(f"{size} parameters are too many for a tiny model")
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=attention, experts_implementation="eager",
                                     dtype=dtype)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # also where an initialization is zero
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.02 * noise)
    return model.to(dtype).eval()


def inputs_of(model: PreTrainedModel, padded: bool, seed: int = 0) -> tuple[dict[str, Any], Tensor | None]:
    """`(inputs, mask)`: two rows for this model, the first padded on the left; mask: [2, T] of tokens, if it reads any.

    Raises:
        ValueError: the model reads something that is not made here.
    """
    generator = torch.Generator().manual_seed(seed)
    names, config = inspect.signature(model.forward).parameters, model.config
    inputs: dict[str, Any] = {}
    mask = None

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)

    if "input_ids" in names:
        inputs["input_ids"] = torch.randint(5, VOCABULARY - 20, (2, LENGTH), generator=generator)
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        if padded:
            mask[0, :PADDED] = 0
            inputs["input_ids"][0, :PADDED] = 0
            inputs["attention_mask"] = mask
    both = all(hasattr(config, name) for name in ("text_config", "vision_config"))  # CLIP and its kin
    both = both and not hasattr(config, "image_token_index") and not hasattr(config, "image_token_id")
    if "pixel_values" in names and (mask is None or both):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 16)
        size = size if isinstance(size, int) else size[0]
        inputs["pixel_values"] = noise(2, getattr(vision, "num_channels", 3), size, size)
    elif "input_features" in names and mask is None:
        frames = 2 * getattr(config, "max_source_positions", 32)
        inputs["input_features"] = noise(2, getattr(config, "num_mel_bins", 80), frames)
    elif "input_values" in names and mask is None:
        inputs["input_values"] = noise(2, 4000)
    if not inputs:
        raise ValueError(f"{type(model).__name__} reads {model.main_input_name}")
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(5, VOCABULARY - 20, (2, LENGTH - 3), generator=generator)
    if "use_cache" in names or any(name.kind is name.VAR_KEYWORD for name in names.values()):
        inputs["use_cache"] = False
    return inputs, mask


@dataclass(frozen=True)
class Outcome:
    """What one model did: `kind` is "equal", "refused", "wrong", "failed" or "no reference"."""

    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}"


def compare(
    model_class: type[PreTrainedModel], config: Any, inputs: dict[str, Any] | None = None, *, padded: bool = False,
    dtypes: Collection[torch.dtype] = (torch.float64, torch.float32),
) -> Outcome:  # fmt: skip
    """Outputs with `d2o` against those with `sdpa`, or with `eager` where the model has no `sdpa`; tokens only.

    In float64; in float32, and with a wider tolerance, where the model cannot compute in it.

    Args:
        inputs: of the forward, if not those of `inputs_of`.
    """
    expected, why = None, ""
    for dtype, reference in itertools.product(dtypes, ("sdpa", "eager")):
        try:
            model = build(model_class, config, reference, dtype)
            given, mask = inputs_of(model, padded) if inputs is None else (inputs, inputs.get("attention_mask"))
            expected = outputs(model, given, mask)
            break
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises
            why = why or f"{reference}: {said(error)}"
    if expected is None:
        return Outcome("no reference", why)
    largest = max((float(_finite(tensor).abs().max()) for tensor in expected.values() if tensor.numel()), default=0.0)
    if not largest:
        return Outcome("no reference", f"{reference}: no output is a number, or all are zero")
    try:
        found = outputs(build(model_class, config, "d2o", dtype), given, mask)
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001
        # Some types look their attention class up by its name, and know no other than their own: a KeyError.
        named = isinstance(error, ValueError) or (isinstance(error, KeyError) and error.args == ("d2o",))
        return Outcome("refused" if named else "failed", said(error))
    if found.keys() != expected.keys():
        return Outcome("wrong", f"outputs {sorted(found)}, but {sorted(expected)} with {reference}")
    off = max(_difference(found[name], expected[name]) for name in expected)
    kind = "equal" if off <= TOLERANCE[reference, dtype] * max(largest, 1.0) else "wrong"
    return Outcome(kind, f"off by {off:.1e} of {largest:.1e} ({reference}, {str(dtype).removeprefix('torch.')})")


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest, where `other` is a number; infinite where only `one` is not, or shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    there = other.isfinite()
    off = (one - other)[there].abs()
    return float(off.nan_to_num(float("inf")).max()) if off.numel() else 0.0


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, Any], mask: Tensor | None) -> dict[str, Tensor]:
    """All float outputs of a forward by name, without those at padding."""
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            tokens = mask is not None and value.dim() >= 3 and value.shape[:2] == mask.shape
            found[name] = (value[mask.bool()] if tokens else value).double()
        elif isinstance(value, dict):
            for key, part in value.items():
                keep(f"{name}.{key}", part)
        elif isinstance(value, (tuple, list)):
            for key, part in enumerate(value):
                keep(f"{name}.{key}", part)

    keep("", dict(model(**inputs)))
    return found


def classes_of(config_class: type) -> list[type[PreTrainedModel]]:
    """The bare model of this type and its causal language model, those there are."""
    found: list[Any] = []
    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        one = mapping.get(config_class, None)
        found += one if isinstance(one, (tuple, list)) else [one]
    return list(dict.fromkeys(filter(None, found)))


def sweep(model_type: str, **changes: Any) -> dict[str, Outcome]:
    """Outcomes of every class of this type, padded and not, by name: of the first variant that a reference runs."""
    outcomes = {}
    for model_class in classes_of(CONFIG_MAPPING[model_type]):
        for padded in (False, True):
            name, outcome = f"{model_class.__name__} {'padded' if padded else 'whole'}", None
            for leave, set_to in VARIANTS:
                try:
                    config = tiny_config(CONFIG_MAPPING[model_type], {**set_to, **changes}, leave)
                except Exception as error:  # noqa: BLE001
                    outcome = outcome or Outcome("no reference", f"configuration: {said(error)}")
                    continue
                tried = compare(model_class, config, padded=padded)
                outcome = tried if outcome is None or tried.kind != "no reference" else outcome
                if tried.kind != "no reference":
                    break
            outcomes[name] = outcome
    return outcomes


def main(model_types: Collection[str]) -> None:
    """A line for each class of these types; after a minute a type is given up."""

    def give_up(*_: Any) -> None:
        raise TimeoutError("a minute is over")

    signal.signal(signal.SIGALRM, give_up)
    for model_type in model_types:
        signal.alarm(60)
        try:
            outcomes = sweep(model_type)
        except TimeoutError as error:
            outcomes = {"": Outcome("no reference", str(error))}
        signal.alarm(0)
        for name, outcome in outcomes.items():
            print(f"{model_type:24} {name:48} {outcome}", flush=True)


if __name__ == "__main__":
    import d2o_dist  # noqa: F401 - registers the attention

    torch.set_num_threads(1)
    main(sys.argv[1:] or CONFIG_MAPPING.keys())
