"""A whole model of real shape with random weights: time to first token, tokens/s and memory, full cache against D2O.

    python -m benchmarks.model --model llama3-8b --length 32768 --batches 1,4 --device cuda --out docs/benchmarks

Nothing is downloaded. Random weights say nothing about answers, and random attention is flatter than that of text; time
and memory depend on shapes. All rows of a batch are read at once, so the peak is that of the whole cache in both.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from benchmarks.presets import preset_of_many
from benchmarks.timing import machine, markdown_table, write_report
from d2o_dist import D2OCache
from d2o_dist.config.infer import DECODE_GRAPHS
from d2o_dist.engine.cuda_graph import graph_recorder
from d2o_dist.engine.stepper import Stepper
from d2o_dist.models.hf import HFModel, run_model

GATE_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
GATE_LENGTH = 65
WARM = 2

MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama3-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 20,
    ),
    "qwen2.5-7b": lambda: Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=1 << 20,
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 20,
    ),
}


def full_bytes(cache: Cache) -> int:
    """Of the keys and values of a cache of transformers."""
    return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)


def build_model(name: str, num_layers: int | None, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The named shape with random weights, made on the device; `num_layers` of its layers if given."""
    config = MODELS[name]()
    if num_layers:
        config.num_hidden_layers = num_layers
        config.layer_types = None if getattr(config, "layer_types", None) is None else config.layer_types[:num_layers]
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="d2o").eval()


def new_cache(model: PreTrainedModel, preset: str, keep_ratio: float) -> Cache:
    """`sdpa`: PyTorch's attention over transformers' own cache; else a D2OCache of that preset."""
    model.set_attn_implementation("sdpa" if preset == "sdpa" else "d2o")
    if preset == "sdpa":
        return DynamicCache(config=model.config)
    # At the ratio that is asked for, also where the prompt is short.
    options = {} if preset == "full" else {"keep_ratio": keep_ratio, "budget": {"min_layer_tokens": 32}}
    return D2OCache(config=model.config, d2o=preset_of_many(preset, **options))


@torch.inference_mode()
def check_gate(model: PreTrainedModel, device: str) -> float:
    """Largest difference of logits between PyTorch's attention and a D2OCache that evicts nothing.

    Raises:
        SystemExit: it is too large to time anything.
    """
    ids = torch.arange(GATE_LENGTH, device=device)[None] % model.config.vocab_size
    logits = []
    for preset in ("sdpa", "full"):
        cache = new_cache(model, preset, 1.0)
        run_model(model, ids[:, :-1], None, cache)
        logits.append(run_model(model, ids[:, -1:], None, cache).float())
    error = (logits[0] - logits[1]).abs().max().item()
    if not error <= GATE_LIMIT[model.dtype]:
        raise SystemExit(f"correctness gate is red, nothing is timed: logits differ by {error:.1e}")
    return float(f"{error:.1e}")


@torch.inference_mode()
def measure(
    model: PreTrainedModel, preset: str, keep_ratio: float, batch: int, length: int, steps: int, decode_graph: str
) -> dict:
    """Seconds to the first token (compression included), tokens/s after it, and bytes.

    The first `WARM` decode steps are not timed: a CUDA graph is captured in the second.
    """
    device = model.device
    cache = new_cache(model, preset, keep_ratio)
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = _now(on_gpu)
    token = run_model(model, ids, None, cache).argmax(-1, keepdim=True)
    if preset != "sdpa":
        cache.finalize()
    first = _now(on_gpu)
    step = decode_step(model, cache, decode_graph)
    for number in range(WARM + steps):
        if number == WARM:
            warm = _now(on_gpu)
        token = step(token)
    end = _now(on_gpu)
    held = cache.report().held_bytes if preset != "sdpa" else full_bytes(cache)
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if on_gpu else "not measured"
    return {
        "first token, s": f"{first - start:.3f}",
        "tokens/s": f"{batch * steps / (end - warm):.2f}",
        "KV cache, MiB": f"{held / 2**20:.1f}",
        "peak, GiB": peak,
    }


def decode_step(model: PreTrainedModel, cache: Cache, decode_graph: str) -> Callable[[Tensor], Tensor]:
    """The newest tokens [B, 1] -> the next ones; with a D2OCache as a session does it."""
    if not isinstance(cache, D2OCache):
        return lambda token: run_model(model, token, None, cache).argmax(-1, keepdim=True)
    stepper = Stepper(HFModel(model), graph_recorder(decode_graph, cache.shape, model.device, cache.ranks))
    return lambda token: stepper.step(cache, token[:, 0]).argmax(-1, keepdim=True)


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b", choices=MODELS)
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--length", type=int, default=32768, help="prompt tokens of each row")
    parser.add_argument("--batches", default="1", help="rows, comma separated; one that does not fit is reported so")
    parser.add_argument("--presets", default="sdpa,full,d2o,lean", help="sdpa is transformers' own cache")
    parser.add_argument("--keep-ratio", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=64, help="decoded tokens a row")
    parser.add_argument(
        "--decode-graph", default="auto", choices=DECODE_GRAPHS, help="whether steps of a D2OCache are CUDA graphs"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="write dated JSON and Markdown here")
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"device {args.device!r}: this machine has no CUDA device")
    model = build_model(args.model, args.layers, getattr(torch, args.dtype), args.device)
    facts = {**machine(), "dtype": args.dtype, "layers": model.config.num_hidden_layers, "keep_ratio": args.keep_ratio}
    facts |= {"steps": args.steps, "decode graph": args.decode_graph, "error of logits": check_gate(model, args.device)}
    rows = []
    for batch in (int(x) for x in args.batches.split(",")):
        for preset in args.presets.split(","):
            measure(model, preset, args.keep_ratio, 1, min(args.length, 256), 2, "never")  # kernels are compiled
            row = {"model": args.model, "T": args.length, "batch": batch, "cache": preset}
            sizes = (args.keep_ratio, batch, args.length, args.steps)
            try:
                rows.append(row | measure(model, preset, *sizes, args.decode_graph))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                rows.append(row | dict.fromkeys(("first token, s", "tokens/s", "KV cache, MiB"), "out of memory"))
                rows[-1]["peak, GiB"] = ""
            print(rows[-1], flush=True)
    print(*(f"{key}: {value}" for key, value in facts.items()), "", markdown_table(rows), sep="\n")
    if args.out:
        print(f"\nwritten: {write_report(args.out, 'model', rows, facts)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
