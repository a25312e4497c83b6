"""A folder that holds an adapter (peft) in place of a model, as its files say it. Nothing here needs peft."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

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
