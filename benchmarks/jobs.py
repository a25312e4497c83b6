"""A job of prompts and answers of mixed lengths: rows that come and go, against fixed batches, in one run.

    python -m benchmarks jobs --model FOLDER --threads 1 --out docs/benchmarks

Both run in turns, a few steps at a time, so that a busy machine slows both alike. Fixed batches are those of rows of
similar length, read together and each run to its last row; rows that have ended are dropped from them as well. Rows
that come and go are read one by one, and their steps have a multiple of four rows. Answers have the lengths
they are given, whatever the model says.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.model import MODELS, build_model
from benchmarks.presets import preset_of_many
from benchmarks.timing import machine, markdown_table, write_report
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.batching import make_batches
from d2o_dist.engine.encode import Request
from d2o_dist.engine.loop import Running
from d2o_dist.engine.scheduler import Room, Scheduler, longest_first
from d2o_dist.engine.session import Session
from d2o_dist.engine.steady import steady_rows
from d2o_dist.policy.config import D2OConfig


class Numbers:
    """A tokenizer whose text is the token ids."""

    def decode(self, ids: Sequence[int], **kwargs: object) -> str:
        """Text."""
        return " ".join(map(str, ids))


class Counting(Running):
    """Counts its steps, and the rows that went on in each."""

    steps: list[int] = []

    def step(self):
        """As of `Running`."""
        Counting.steps.append(len(self.going))
        return super().step()


def mixed(count: int, low: int, high: int, rng: random.Random) -> list[int]:
    """Lengths that are spread evenly over their logarithms."""
    return [round(math.exp(rng.uniform(math.log(low), math.log(high)))) for _ in range(count)]


def fixed(requests: Sequence[Request], read: Callable[[Sequence[Request]], Running], room: Room) -> Iterator[dict]:
    """Batch after batch: tokens by row, of rows that ended."""
    lengths = [len(request.input_ids) for request in requests]
    for places in make_batches(lengths, room.rows, room.tokens, room.border):
        running = read([requests[place] for place in places])
        ended = [row for row in running.rows if row.result.has_ended]
        while running.going:
            yield {row.request.index: row.result.tokens for row in ended}
            ended = running.step()
        yield {row.request.index: row.result.tokens for row in ended}


def come_and_go(requests: Sequence[Request], read: Callable, room: Room) -> Iterator[dict]:
    """As the engine runs them."""
    for ended in Scheduler(iter(longest_first(requests)), read, room, on_failure=_raise).run():
        yield {request.index: result.tokens for request, result in ended}


def _raise(requests: Sequence[Request], error: Exception) -> None:
    raise error


def in_turns(ways: dict[str, Iterator[dict]]) -> dict[str, dict]:
    """Seconds, tokens by row, and the rows of each step; whoever has given fewer tokens goes on."""
    found = {name: {"wall": 0.0, "cpu": 0.0, "tokens": {}, "steps": []} for name in ways}
    open_ways = dict(ways)
    while open_ways:
        name = min(open_ways, key=lambda one: sum(map(len, found[one]["tokens"].values())))
        Counting.steps, wall, cpu = [], time.perf_counter(), time.process_time()
        ended = next(open_ways[name], None)
        mine = found[name]
        mine["wall"] += time.perf_counter() - wall
        mine["cpu"] += time.process_time() - cpu
        mine["steps"] += Counting.steps
        if ended is None:
            del open_ways[name]
        else:
            mine["tokens"].update(ended)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help=f"a folder, or {', '.join(MODELS)} with random weights")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompts", type=int, nargs=2, default=(16, 512), metavar=("LOW", "HIGH"))
    parser.add_argument("--answers", type=int, nargs=2, default=(8, 256), metavar=("LOW", "HIGH"))
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--max-batch-tokens", type=int, default=65536)
    parser.add_argument("--presets", default="d2o", help="run one after the other")
    parser.add_argument("--keep-ratio", type=float, default=0.2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if args.model in MODELS:
        model = build_model(args.model, None, dtype, args.device)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="d2o")
        model = model.to(args.device).eval()
    rng = random.Random(args.seed)
    lengths, answers = mixed(args.rows, *args.prompts, rng), mixed(args.rows, *args.answers, rng)
    requests = [
        Request(index, index, tuple(rng.randrange(model.config.vocab_size) for _ in range(length)), new)
        for index, (length, new) in enumerate(zip(lengths, answers, strict=True))
    ]
    rows = []
    for preset in args.presets.split(","):
        d2o = preset_of_many(preset, **({} if preset == "full" else {"keep_ratio": args.keep_ratio}))
        room = Room(args.max_batch_size, args.max_batch_tokens)

        def read(group: Sequence[Request], steady: bool = False, d2o: D2OConfig = d2o) -> Running:
            session = Session(model, d2o, steady=steady_rows(model) if steady else 1)
            return Counting(session, group, SamplingConfig(ignore_eos=True), Numbers())

        read(requests[:1])  # the first forward of a process is slower
        ways = {
            "fixed batches": fixed(requests, read, room),
            "come and go": come_and_go(requests, partial(read, steady=True), room),
        }
        found = in_turns(ways)
        first = found["fixed batches"]
        for name, mine in found.items():
            same = sum(mine["tokens"][index] == tokens for index, tokens in first["tokens"].items())
            rows.append({
                "cache": preset, "rows": name, "wall, s": f"{mine['wall']:.1f}", "processor, s": f"{mine['cpu']:.1f}",
                "as fast (wall)": f"{first['wall'] / mine['wall']:.2f}x",
                "as fast (processor)": f"{first['cpu'] / mine['cpu']:.2f}x",
                "steps": len(mine["steps"]), "rows at once (mean)": f"{sum(mine['steps']) / len(mine['steps']):.1f}",
                "rows at once (most)": max(mine["steps"]), "rows of the same tokens": f"{same} of {args.rows}",
            })  # fmt: skip
            print(markdown_table(rows[-1:]), flush=True)
    facts = {**machine(), **{key: str(value) for key, value in vars(args).items() if key != "out"}}
    facts |= {"model": Path(args.model).name, "prompt tokens": sum(lengths), "new tokens": sum(answers)}
    print(markdown_table(rows))
    if args.out is not None:
        print(write_report(args.out, "jobs", rows, facts))


if __name__ == "__main__":
    main()
