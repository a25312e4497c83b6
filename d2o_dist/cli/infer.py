"""`launch/infer.py`: prompts in, results out. Exit: 0 all rows ok, 1 some failed, 2 bad usage, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from d2o_dist.config.infer import InferConfig
from d2o_dist.config.io import dump_yaml
from d2o_dist.config.overrides import parse_override
from d2o_dist.engine.runner import Plan, prepare, run
from d2o_dist.engine.summary import Summary

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="infer.py",
        description="Generate text with a compressed KV cache. Flags and overrides take precedence over the file.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of an InferConfig")
    parser.add_argument("--model", help="folder or hub name of a causal language model")
    parser.add_argument("--prompts", metavar="FILE", help=".jsonl (id, prompt or messages) or .txt (one prompt)")
    parser.add_argument("--prompt", help="one prompt")
    parser.add_argument("--output", metavar="FILE", help="JSONL of results; standard output if not given")
    parser.add_argument("--preset", help="named D2O configuration, such as d2o, mass, full")
    parser.add_argument("--keep-ratio", help="fraction of the cache to keep, in (0, 1]")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any field, such as sampling.top_p=0.9")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same, repeatable")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    # The DeepSpeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> InferConfig:
    """The file, then the flags, then the overrides in the order given."""
    overrides = [(name, value) for name in ("model", "output") if (value := getattr(args, name)) is not None]
    for name, other in (("prompts", "prompt"), ("prompt", "prompts")):
        if getattr(args, name) is not None:
            # A source on the command line replaces the other kind of source in the file.
            overrides += [(name, getattr(args, name))]
            overrides += [(other, None)] if getattr(args, other) is None else []
    if args.preset is not None:
        overrides.append(("d2o.preset", args.preset))
    if args.keep_ratio is not None:
        overrides.append(parse_override(f"d2o.keep_ratio={args.keep_ratio}"))
    overrides += [parse_override(text) for text in [*args.overrides, *args.set]]
    return InferConfig.load(args.config, overrides)


def run_plan(config: InferConfig, plan: Plan) -> Summary:
    """Run with the right display: text as it comes and the cache's report, or a progress bar and JSONL."""

    def log(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    on_terminal = config.stream == "auto" and plan.num_rows == 1 and sys.stdout.isatty()
    if config.stream is True or (on_terminal and config.output != "-"):
        return run(config, plan, on_text=show, on_report=lambda report: print(f"\n\n{report}"), log=log)
    with tqdm(total=plan.num_rows, unit="row", file=sys.stderr, disable=None) as bar:
        return run(config, plan, on_rows=bar.update, log=log)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, run, tear down; the exit status."""
    args = make_parser().parse_intermixed_args(argv)
    try:
        if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ValueError(f"WORLD_SIZE ({world}) must be 1: this program runs on one rank")
        config = read_config(args)
        if args.print_config:
            print(dump_yaml(config.to_dict()), end="")
            return EXIT_OK
        plan = prepare(config)
        for line in [*plan.warnings, *(f"row {bad.index} ({bad.id!r}): {bad.error}" for bad in plan.bad_rows[:10])]:
            print(f"warning: {line}", file=sys.stderr)
        summary = run_plan(config, plan)
    except ValueError as error:
        print(f"infer.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(summary, file=sys.stderr)
    if summary.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if summary.num_failed else EXIT_OK
