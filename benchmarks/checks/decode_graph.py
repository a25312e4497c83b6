"""Checks of decode steps that are CUDA graphs: a session's replays beside the same session run by Python.

Whole tiny models with random weights, in ragged batches, over evictions, with rows that end.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks.checks.common import STATISTICS_LIMIT, Check, Result, relative_error
from benchmarks.presets import preset_of_many
from d2o_dist.engine.session import Session, left_pad

STEPS = 40
LENGTHS = (70, 23, 51)


@dataclass(frozen=True)
class Case:
    """One model, preset and dtype."""

    preset: str
    dtype: torch.dtype = torch.bfloat16
    family: type = LlamaConfig
    lengths: tuple[int, ...] = LENGTHS


CASES = {
    "d2o": Case("d2o"),
    "lean": Case("lean"),
    "lean-float32": Case("lean", torch.float32),
    "d2o-qwen2": Case("d2o", family=Qwen2Config),
    "h2o": Case("h2o", torch.float16),
    "released": Case("released", torch.float32),
    "reread": Case("reread"),  # heads that hold different numbers of slots
    "reread-float32": Case("reread", torch.float32),
    "full": Case("full"),
    "one-row": Case("lean", lengths=(70,)),
}


def checks() -> list[Check]:
    """Each case; they need a CUDA device."""
    return [
        Check("decode_graph", name, lambda device, case=case: run(case, device), needs_cuda=True)
        for name, case in CASES.items()
    ]


@torch.inference_mode()
def run(case: Case, device: str) -> Result:
    """Both sessions are given the same tokens: those that Python's logits choose."""
    torch.manual_seed(0)
    config = case.family(
        vocab_size=128, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=1024,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="d2o").to(device, case.dtype).eval()
    sizes = {} if case.preset == "full" else {"keep_ratio": 0.3, "budget": {"min_layer_tokens": 12}}
    d2o = preset_of_many(case.preset, **sizes)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 128, (length,), generator=generator).tolist() for length in case.lengths]
    plain, graph = (Session(model, d2o, decode_graph=mode) for mode in ("never", "always"))
    logits, same = (session.prefill(*left_pad(prompts, 0)) for session in (plain, graph))
    result = Result()
    result.near("first logits", same, logits, STATISTICS_LIMIT)
    furthest = 0.0
    for step in range(STEPS):
        tokens = logits.argmax(-1).tolist()
        # The second row ends in the middle: the step is captured once more.
        live = [row != 1 or step < STEPS // 2 for row in range(len(prompts))]
        logits, found = plain.decode(tokens, live), graph.decode(tokens, live)
        furthest = max(furthest, relative_error(found[live], logits[live]))
    result.errors["logits"] = (furthest, STATISTICS_LIMIT)
    kinds = 1 if len(prompts) == 1 else 2
    result.equal("steps replayed", torch.tensor(graph.num_replayed), torch.tensor(STEPS - kinds))
    for one, other in zip(plain.cache.layers, graph.cache.layers, strict=True):
        live = one.positions >= 0
        result.equal(f"positions of layer {one.index}", other.positions, one.positions)
        for name in ("keys", "values", "scores", "rates", "log_mass"):
            want, got = getattr(one, name)[live].float(), getattr(other, name)[live].float()
            result.near(f"{name} of layer {one.index}", got, want, STATISTICS_LIMIT)
    return result
