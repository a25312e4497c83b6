"""The trained model as a folder that `from_pretrained` and `launch/infer.py` load; LoRA is merged into the weights."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from d2o_dist.comm import Collectives
from d2o_dist.train.engine import Engine
from d2o_dist.train.manifest import sync, sync_tree

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_model(engine: Engine, tokenizer: Any, folder: Path, dtype: str, world: Collectives) -> None:
    """Write model and tokenizer. Called by all ranks; the first one writes, and the folder appears complete.

    Args:
        dtype: of the weights written: `float32` or `bfloat16`.
    """
    with engine.gathered_weights():
        if world.rank == 0:
            scratch = folder.with_name(f".{folder.name}")
            shutil.rmtree(scratch, ignore_errors=True)
            model = plain_model(engine.objective.model, _DTYPES[dtype])
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            replace_folder(scratch, folder)
    world.barrier()


def replace_folder(new: Path, folder: Path) -> None:
    """Give a complete folder its name, in place of an older one, which goes when that is on the disk and not before."""
    old = folder.with_name(f".{folder.name}-replaced")
    sync_tree(new)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def plain_model(model: Any, dtype: torch.dtype) -> Any:
    """A copy on the CPU as transformers knows it: without hooks or peft, with its cache switched on again."""
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    with torch.device("meta"):
        fresh = type(base)(copy.deepcopy(base.config))
    if hasattr(model, "peft_config"):
        import peft

        (options,) = model.peft_config.values()
        fresh = peft.get_peft_model(fresh, copy.deepcopy(options))
    fresh.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers():  # those that no state holds, such as rotary frequencies
        path, _, leaf = name.rpartition(".")
        fresh.get_submodule(path).register_buffer(leaf, buffer.detach().to("cpu", copy=True), persistent=name in state)
    fresh.tie_weights()
    if hasattr(fresh, "merge_and_unload"):
        fresh = fresh.merge_and_unload()
    fresh = fresh.to(dtype)
    fresh.config.use_cache = True
    fresh.config.dtype = dtype
    fresh.generation_config = copy.deepcopy(base.generation_config)
    return fresh.eval()
