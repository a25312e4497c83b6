"""Whether prompts fit into memory, by the planner's arithmetic, before any weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.encode import BadRow, Request
from d2o_dist.engine.reading import TILE
from d2o_dist.plan.memory import PromptMemory, prompt_memory, reading_of, rules_of
from d2o_dist.plan.meshes import share_of
from d2o_dist.plan.model_size import config_of, known_models, size_of

# The arithmetic was within a tenth of what real runs took: what exceeds a device by less may fit.
TOLERANCE = 1.1
# Memory is tried in blocks of so many bytes: what is free need not lie in one piece.
_BLOCK_BYTES = 64 * 2**20


def memory_of(config: InferConfig, device: torch.device) -> Callable[[int], PromptMemory]:
    """Tokens of a prompt, alone in its batch -> what it needs on the rank with most.

    Raises:
        ValueError: a model that the planner does not know, or cannot share as the configuration says.
    """
    found = config_of(config)
    model, dtype = size_of(found), getattr(torch, config.dtype, None) or found.dtype or torch.float32
    if config.dtype == "auto" and device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32  # as weights are loaded
    d2o = rules_of(model, config.d2o)
    share, reading = share_of(model, d2o, config.parallel), reading_of(config.reading, model, d2o)
    chunk = config.prefill_chunk or (TILE if reading == "layerwise" else None)
    return lambda tokens: prompt_memory(
        model, d2o, share, tokens, dtype=dtype, chunk=chunk, reading=reading
    )


def room_of(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def try_room(num_bytes: int, device: torch.device) -> None:
    """See whether the device has so much memory left, by taking it for a moment.

    Raises:
        torch.OutOfMemoryError, or on a CPU RuntimeError: it has not.
    """
    held = []
    for start in range(0, num_bytes, _BLOCK_BYTES):
        held.append(torch.empty(min(_BLOCK_BYTES, num_bytes - start), dtype=torch.uint8, device=device))


def describe(memory: PromptMemory) -> str:
    """The parts, for people."""
    gib = {"weights": memory.weights, "kept": memory.kept, "one layer": memory.one_layer, "a forward": memory.forward}
    whole = {"the whole cache": memory.prompt} if memory.reading == "whole" else {"hidden states": memory.hidden}
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in (gib | whole).items())
    return f"{memory.peak / 2**30:.2f} GiB on one rank, read {memory.reading} ({parts})"


def refuse_too_long(
    rows: Sequence[Request | BadRow], config: InferConfig, device: torch.device, room: int | None = None
) -> list[Request | BadRow]:
    """The rows, with those whose prompt would not fit even alone as bad ones. Models that the planner does not know are
    not checked.

    Args:
        room: bytes of the device; by default all it has.
    """
    try:
        memory = memory_of(config, device)
    except ValueError:
        return list(rows)
    if device.type == "cuda" and not torch.cuda.is_available():
        return list(rows)
    room = room_of(device) if room is None else room
    longest = sorted({len(row.input_ids) for row in rows if isinstance(row, Request)}, reverse=True)
    errors = {}
    for tokens in longest:
        needed = memory(tokens)
        if needed.peak <= TOLERANCE * room:
            break
        errors[tokens] = (
            f"the prompt has {tokens} tokens, which need {describe(needed)}, and {device} has {room / 2**30:.2f} GiB: "
            + ("read it layerwise, " if needed.reading == "whole" else "") + "keep less, or let more ranks share it"
        )
    return [
        BadRow(row.index, row.id, errors[len(row.input_ids)], len(row.input_ids))
        if isinstance(row, Request) and len(row.input_ids) in errors
        else row
        for row in rows
    ]


def memory_comment(config: InferConfig) -> str:
    """Lines of a comment: what the longest prompt of a run would need, and how layers share where this model changes
    that. A hub is not asked for it."""
    try:
        if config.model not in known_models() and not Path(config.model).expanduser().is_dir():
            raise ValueError(f"{config.model} is no folder")
        # A device that is named need not be here.
        is_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
        device = torch.device("cpu" if is_cpu else "cuda")
        memory, found = memory_of(config, device), config_of(config)
    except ValueError as error:
        return f"# memory: not known: {' '.join(str(error).split())}\n"
    positions = getattr(found, "max_position_embeddings", None)
    tokens = config.max_prompt_tokens or (positions and positions - config.sampling.max_new_tokens) or 32768
    other = replace(config, reading="whole") if memory(tokens).reading == "layerwise" else None
    lines = [f"# memory of a prompt of {tokens} tokens: {describe(memory(tokens))}\n"]
    model = size_of(found)
    rule = rules_of(model, config.d2o).budget
    if rule is not config.d2o.budget:
        few = f"{model.num_full_layers} layers with full attention are few"
        lines.append(f"# budget.rule is {rule.name} with this model, whose {few}\n")
    if other is not None:
        whole = memory_of(other, device)(tokens)
        lines.append(f"# with reading=whole: {whole.peak / 2**30:.2f} GiB\n")
    return "".join(lines)
