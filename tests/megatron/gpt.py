"""Megatron models of the tests' weights, on ranks without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedModel

from d2o_dist.comm.adapters import from_megatron
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.models.megatron.convert import load_hf, make_gpt


@contextmanager
def megatron_ranks(tp: int = 1, cp: int = 1) -> Iterator[ParallelMesh]:
    """Megatron's groups over the ranks that there are, and our mesh of them."""
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    # Where Megatron puts rotary frequencies and buffers; and what 0.16 forgets to define without Transformer Engine.
    on_cpu = patch.object(torch.cuda, "current_device", lambda: torch.device("cpu"))
    without_engine = patch("megatron.core.transformer.moe.moe_utils.te_general_gemm", None, create=True)
    no_stream = patch.object(torch.cuda, "current_stream", lambda: None)  # 0.19 asks, and has nothing to wait for
    try:
        with on_cpu, without_engine, no_stream:
            yield from_megatron(parallel_state)
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()


def gpt_of(model: PreTrainedModel, **fields) -> GPTModel:
    """The part of this rank of a model with the same weights, in their dtype and in evaluation mode."""
    made = make_gpt(model.config, params_dtype=model.dtype, **fields)
    load_hf(made, model.state_dict())
    return made.eval()
