"""An adapter (peft) in place of a model: its base is loaded, and the adapter merged into it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from d2o_dist.fields.show import told_by


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
