"""Checks of how much a GPU is asked to do in a decode step of a layer: kernels of ours and operators that compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.checks.common import Check, Result, using
from d2o_dist.cache.layer import Layer
from d2o_dist.engine.session import Session, left_pad
from d2o_dist.policy.config import D2OConfig

# Attention of splits of the slots, which also writes the token; and their merge, with scores and rates.
KERNELS_A_LAYER = 2
LAYERS, STEPS = 2, 2


def checks() -> list[Check]:
    """Presets that keep other statistics, of which one has heads that hold different numbers of slots."""
    return [
        Check("launches", name, lambda device, name=name: run(name, device))
        for name in ("d2o", "h2o", "reread")
    ]


@torch.inference_mode()
def run(preset: str, device: str) -> Result:
    """Steps of a tiny model, a ragged batch of which one row ends, by Triton."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=512,
    )  # fmt: skip
    config._attn_implementation = "d2o"
    model = LlamaForCausalLM(config).to(device).eval()
    d2o = D2OConfig.preset(preset, keep_ratio=0.5, budget={"min_layer_tokens": 8})
    session = Session(model, d2o, decode_graph="never")
    session.prefill(*left_pad([list(range(2, 42)), list(range(7, 30))], 0))
    session.decode([5, 6], [True, True])  # the first step makes tables
    with using("triton"):
        with _counted() as counts:
            for _ in range(STEPS):
                session.decode([5, 6], [True, False])
    result = Result()
    for name, got, want in zip(("kernels", "operators"), counts, (KERNELS_A_LAYER, 0), strict=True):
        result.equal(f"{name} a layer and step", torch.tensor(got), torch.tensor(want * LAYERS * STEPS))
    return result


class _Operators(TorchDispatchMode):
    """Counts operators that compute: no views, and no memory that is only taken."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func._schema.name.startswith("aten::empty"):
            self._counts[1] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Launches of kernels, and operators, of all layers while they decode."""
    from d2o_dist.kernels.decode_attention import triton as attention
    from d2o_dist.kernels.finish_decode import triton as end

    counts, decode, launch = [0, 0], Layer.decode, attention.launch

    def counted(*args, **kwargs):
        counts[0] += 1
        # Interpreted kernels are made of operators.
        with torch.utils._python_dispatch._disable_current_modes():
            return launch(*args, **kwargs)

    def watched(*args, **kwargs):
        with _Operators(counts):
            return decode(*args, **kwargs)

    with patch.object(attention, "launch", counted), patch.object(end, "launch", counted):
        with patch.object(Layer, "decode", watched):
            yield counts
