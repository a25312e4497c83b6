"""A model on text, over the plain model: reading a prompt, a step, and what a step over few tokens takes at best.

    python -m benchmarks.text MODEL --text essays.txt --tokens 1024 --presets d2o,lean,snapkv --threads 1

MODEL is a folder or a name of the hub. The plain model has transformers' `sdpa` and `DynamicCache`. Real weights on
real text: what a cache costs hangs on where attention goes. All cases take turns, in readings and in single steps, so
that a busy machine slows all alike; evictions are in the steps. `least` is a plain cache that begins with as many
tokens as are kept: a cache that keeps them cannot be much below. One model serves all, for where its weights lie counts
too. A line of JSON for each case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from benchmarks.timing import machine
from d2o_dist import D2OCache, D2OConfig

WARM_STEPS = 3


def prompts_of(tokenizer, text: str, rows: int, tokens: int) -> Tensor:
    """[rows, tokens] int64: parts of a text that follow each other."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) < rows * tokens:
        raise ValueError(f"the text has {len(ids)} tokens, but {rows} x {tokens} are wanted")
    return ids[: rows * tokens].view(rows, tokens)


class Case:
    """One cache on one model: what is read, and the seconds of each part."""

    def __init__(self, model: PreTrainedModel, d2o: D2OConfig | None, prompts: Tensor) -> None:
        self.model, self.d2o, self.prompts = model, d2o, prompts
        self.readings: list[float] = []
        self.steps: list[float] = []

    def read(self) -> None:
        """A new cache reads the prompts, and is compressed where it can be layer by layer."""
        self._choose_attention()
        self.cache = DynamicCache() if self.d2o is None else D2OCache(
            self.model.config, self.d2o, reading="layerwise" if self.d2o.suits_layerwise else "whole"
        )
        self.readings.append(self._seconds(self.prompts))

    def step(self, tokens: Tensor) -> None:
        """One token a row."""
        self._choose_attention()
        self.steps.append(self._seconds(tokens))

    def _choose_attention(self) -> None:
        self.model.set_attn_implementation("sdpa" if self.d2o is None else "d2o")

    @torch.inference_mode()
    def _seconds(self, ids: Tensor) -> float:
        start = time.perf_counter()
        self.model(ids, past_key_values=self.cache, logits_to_keep=1)
        return time.perf_counter() - start


def measure(cases: dict[str, Case], tokens: Tensor, rounds: int) -> dict[str, Case]:
    """The prompts of all cases are read `rounds` times, after one to warm up; then come steps of the columns of
    tokens [rows, steps], the first ones to warm up."""
    for _ in range(rounds + 1):
        for case in cases.values():
            case.read()
    for column in tokens.split(1, 1):
        for case in cases.values():
            case.step(column)
    for case in cases.values():
        del case.readings[0], case.steps[:WARM_STEPS]
    return cases


def lines(cases: dict[str, Case]) -> list[dict[str, object]]:
    """Milliseconds of each case, and how often those of the first one."""
    plain, *_ = cases.values()
    found = []
    for name, case in cases.items():
        line: dict[str, object] = {"case": name, "rows": len(case.prompts), "tokens": case.prompts.shape[1]}
        for what, mine, base in (("reading", case.readings, plain.readings), ("step", case.steps, plain.steps)):
            line |= {
                f"{what}, ms": round(1e3 * statistics.median(mine), 2),
                f"{what}, ratio": round(statistics.median(mine) / statistics.median(base), 3),
                f"{what}, ratio of means": round(statistics.fmean(mine) / statistics.fmean(base), 3),
            }
        found.append(line)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the machine, and a line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--presets", default="d2o,lean,snapkv")
    parser.add_argument("--keep-ratio", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="readings of each prompt")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tokenizer, dtype = AutoTokenizer.from_pretrained(args.model), getattr(torch, args.dtype)
    prompts = prompts_of(tokenizer, args.text.read_text(encoding="utf-8"), args.rows, args.tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="d2o", dtype=dtype).eval()
    presets = {name: D2OConfig.preset(name, keep_ratio=args.keep_ratio) for name in args.presets.split(",")}
    cases = {"plain": Case(model, None, prompts)}
    cases |= {name: Case(model, d2o, prompts) for name, d2o in presets.items()}
    cases["least"] = Case(model, None, prompts[:, : max(1, round(args.keep_ratio * args.tokens))])
    print(json.dumps(machine()), flush=True)
    for line in lines(measure(cases, prompts[:, : args.steps + WARM_STEPS], args.rounds)):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
