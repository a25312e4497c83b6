"""A folder that holds an adapter (peft) in place of a model: its base is loaded, and the adapter merged into it."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from d2o_dist.fields.show import told_by

_FILE = "adapter_config.json"
# They bring tokens or keys of their own into every layer, which no weights can stand for.
_PROMPTS = "PREFIX_TUNING PROMPT_TUNING P_TUNING MULTITASK_PROMPT_TUNING ADAPTION_PROMPT CPT CARTRIDGE".split()


def base_of(name: str) -> str | None:
    """The model that the adapter in this folder is for; None: it is no folder of an adapter alone.

    Raises:
        ValueError: peft is missing, the adapter cannot be merged, or it does not name its base.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").exists() or not (folder / _FILE).is_file():
        return None
    try:
        fields = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        base, kind = fields.get("base_model_name_or_path"), str(fields.get("peft_type"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / _FILE} cannot be read: {error}") from error
    if kind in _PROMPTS:
        raise ValueError(
            f"the adapter {name} is of type {kind}, which puts keys of its own into the cache: a D2OCache serves only "
            "adapters that are merged into the weights, such as LORA"
        )
    if not base:
        raise ValueError(f"the adapter {name} does not say what model it is for (base_model_name_or_path)")
    if find_spec("peft") is None:
        raise ValueError(
            f"{name} is an adapter ({kind}) of {base}: install peft to load it, or merge it and give the merged folder"
        )
    return base


def merge_adapter(model: Any, name: str) -> Any:
    """The model with the adapter of the folder `name` in its weights.

    Raises:
        ValueError: the adapter is not for this model, or cannot be read.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # Adapters that are not in the file would be zero, and change nothing.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(Path(name).expanduser())).merge_and_unload()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # peft and safetensors raise whatever they meet; their first line says what
        raise ValueError(f"the adapter {name} cannot be loaded: {told_by(error)}") from error
