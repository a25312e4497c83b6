"""A long real text through a small random model, alone and on sequence ranks: the same result, memory and traffic.

    python -m benchmarks.sharded --text book.txt --length 32768 --reference one.pt
    torchrun --nproc-per-node 4 -m benchmarks.sharded --text book.txt --length 32768 --reference one.pt --out .

The first command writes what one process decides, the second compares. Tokens are the bytes of the text, or those of
the tokenizer of a `--model`. Peak memory is what the process grew by while it read the prompt and decoded. With
`--forced` the text's own continuation is fed, not what the model chooses, so that outputs which differ can be compared.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.presets import preset_of_many
from benchmarks.timing import machine, write_report
from d2o_dist.comm import Collectives, TrafficCounter, build_mesh, init_distributed, run_guarded
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.policy.config import D2OConfig

SCHEMES = {
    "ulysses, heads": {"sp_prefill": "ulysses", "cache_layout": "heads"},
    "ulysses, sequence": {"sp_prefill": "ulysses", "cache_layout": "sequence"},
    "allgather": {"sp_prefill": "allgather"},
    "ring": {"sp_prefill": "ring"},
    "allgather, local": {"sp_prefill": "allgather", "merge_scope": "local"},
}


def small_model(dtype: torch.dtype, num_kv_heads: int, num_layers: int) -> LlamaForCausalLM:
    """A random Llama of 8 heads of 32, over bytes; its attention is far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=num_layers, num_attention_heads=8,
        num_key_value_heads=num_kv_heads, initializer_range=0.12, max_position_embeddings=1 << 20, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "d2o"
    return LlamaForCausalLM(config).to(dtype).eval()


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def kept_positions(session: Session) -> list[Tensor]:
    """Per layer [H, S] of all ranks, ascending."""
    ranks, found = session.cache.ranks, []
    for layer in session.cache.layers:
        mine = ranks.join_heads(layer.positions) if ranks.by_heads else ranks.sp.all_gather(layer.positions, 2)
        order = mine[0].masked_fill(mine[0] < 0, 1 << 40).sort(-1).values
        found.append(order[:, : layer.kv_len[0]])
    return found


def load(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """The model and the tokens of the text [1, >= length + steps]."""
    dtype = getattr(torch, args.dtype)
    if args.model is None:
        model, ids = small_model(dtype, args.kv_heads, args.layers), list(args.text.read_bytes())
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="d2o").eval()
        text = args.text.read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(args.model)(text, verbose=False)["input_ids"]
    if len(ids) < args.length + args.steps:
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than length ({args.length}) + steps ({args.steps})")
    return model, torch.tensor(ids[: args.length + args.steps])[None]


@torch.inference_mode()
def run(
    model: Any, ids: Tensor, steps: int, config: D2OConfig, parallel: ParallelConfig, *, forced: bool = False
) -> dict[str, Any]:
    """A prompt of all but the last `steps` tokens, then `steps` more, on this rank's part of the mesh."""
    counter = TrafficCounter()
    mesh = build_mesh(sp=parallel.sp) if parallel.sp > 1 else None
    before, began = peak_mib(), time.perf_counter()
    session = Session(model, config, mesh, parallel, counter)
    prompt, rest = ids[:, : ids.shape[1] - steps], ids[0, ids.shape[1] - steps :].tolist()
    logits = session.prefill(prompt, torch.ones_like(prompt))
    first, tokens = kept_positions(session), []
    last = [logits]
    for step in range(steps):
        tokens.append(int(session.cache.ranks.from_first(logits.argmax())))
        logits = session.decode([rest[step] if forced else tokens[-1]])
        last.append(logits)
    return {
        "first": first,
        "last": kept_positions(session),
        "tokens": tokens,
        "logits": torch.cat(last).clone(),
        "budgets": [layer.slot_budgets for layer in session.cache.layers],
        "peak_mib": peak_mib() - before,
        "held_mib": session.rank_bytes / 2**20,
        "prefill_s": session.prefill_s,
        "seconds": time.perf_counter() - began,
        "traffic": {phase: vars(counter.total(phase=phase)) for phase in ("prefill", "finalize", "decode", "evict")},
    }


def compare(
    found: dict[str, Any], wanted: dict[str, Any], everyone: list[dict[str, Any]], steps: int
) -> dict[str, Any]:
    """A row of the report."""

    def same(name: str) -> str:
        pairs = list(zip(found[name], wanted[name], strict=True))
        equal = sum(int((a == b).sum()) for a, b in pairs if a.shape == b.shape)
        total = sum(b.numel() for _, b in pairs)
        return "equal" if equal == total else f"{equal / total:.4f} equal"

    kl = torch.nn.functional.kl_div(
        found["logits"].double().log_softmax(-1), wanted["logits"].double().log_softmax(-1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    traffic = found["traffic"]
    agreed = sum(a == b for a, b in zip(found["tokens"], wanted["tokens"], strict=True))
    return {
        "kept after prompt": same("first"),
        "kept at the end": same("last"),
        "budgets": "equal" if found["budgets"] == wanted["budgets"] else "differ",
        "tokens": f"{agreed}/{len(wanted['tokens'])}",
        "logits differ by": f"{float((found['logits'] - wanted['logits']).abs().max()):.1e}",
        "KL": f"{float(kl):.1e}",
        "peak MiB a rank": f"{max(one['peak_mib'] for one in everyone):.0f}",
        "cache MiB a rank": f"{max(one['held_mib'] for one in everyone):.2f}",
        "prefill MiB sent": f"{traffic['prefill']['bytes'] / 2**20:.1f}",
        "finalize MiB sent": f"{traffic['finalize']['bytes'] / 2**20:.1f}",
        "calls a token": f"{traffic['decode']['calls'] / steps:.2f} + {traffic['evict']['calls'] / steps:.2f}",
        "bytes a token": f"{traffic['decode']['bytes'] / steps:.0f} + {traffic['evict']['bytes'] / steps:.0f}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """One process writes the reference; several compare with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a long text")
    parser.add_argument("--length", type=int, default=32768, help="tokens of it to read")
    parser.add_argument("--steps", type=int, default=64, help="tokens to decode")
    parser.add_argument("--forced", action="store_true", help="feed the text's own continuation")
    parser.add_argument("--preset", default="d2o")
    parser.add_argument("--keep-ratio", type=float, default=0.2)
    parser.add_argument("--model", help="folder or hub name; a small random model if not given")
    parser.add_argument("--kv-heads", type=int, default=4, help="of the random model's 8 query heads")
    parser.add_argument("--layers", type=int, default=2, help="of the random model")
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], default="float64")
    parser.add_argument("--scheme", choices=list(SCHEMES), default="allgather")
    parser.add_argument("--reference", type=Path, required=True, help="what one process decided")
    parser.add_argument("--out", type=Path, help="folder for a dated report")
    args = parser.parse_args(argv)
    size = {} if args.preset == "full" else {"keep_ratio": args.keep_ratio, "budget": {"min_layer_tokens": 32}}
    config = preset_of_many(args.preset, **size)
    launch = init_distributed()
    model, ids = load(args)
    run(model, ids[:, :256], 2, config, ParallelConfig())  # libraries are loaded before memory is read
    scheme = SCHEMES[args.scheme] if launch.world_size > 1 else {}
    parallel = ParallelConfig(sp=launch.world_size, **scheme)
    found = run(model, ids, args.steps, config, parallel, forced=args.forced)
    if launch.world_size == 1:
        torch.save(found, args.reference)
        print({name: found[name] for name in ("budgets", "peak_mib", "held_mib", "prefill_s", "seconds")})
        return 0
    everyone = Collectives(build_mesh(sp=launch.world_size).axis("sp")).all_gather_object(
        {name: found[name] for name in ("peak_mib", "held_mib")}
    )
    if launch.rank == 0:
        wanted = torch.load(args.reference, weights_only=True)
        alone = {"scheme": "one process", "peak MiB a rank": f"{wanted['peak_mib']:.0f}",
                 "cache MiB a rank": f"{wanted['held_mib']:.2f}"}  # fmt: skip
        row = {"scheme": args.scheme, "sp": launch.world_size, **compare(found, wanted, everyone, args.steps)}
        rows = [{key: alone.get(key, "") for key in row}, row]
        for row in rows:
            print(row)
        if args.out is not None:
            told = ("length", "steps", "forced", "preset", "keep_ratio", "dtype", "model", "layers", "kv_heads")
            facts = {**machine(), **{name: getattr(args, name) for name in told}}
            print(write_report(args.out, "sharded", rows, facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_guarded(main))
