"""`launch/evaluate.py`: tasks x methods x budgets. Exit: 0 all results, 1 some failed, 2 bad usage, 130 interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from d2o_dist.comm import build_mesh, init_distributed, read_environment
from d2o_dist.config.eval_tasks import ESSAYS
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.config.io import dump_yaml
from d2o_dist.config.overrides import parse_override
from d2o_dist.demo.fetch import FetchError
from d2o_dist.demo.text import essays
from d2o_dist.eval.evaluate import Outcome, check_parallel, evaluate
from d2o_dist.eval.plan import Plan, prepare

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# Replicas wait for each other only at the end, and some have longer rows than others.
TIMEOUT_S = 24 * 3600


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Evaluate compressed caches beside the full one. Alone, or under torchrun or deepspeed: ranks "
        "share the rows. Results that the output folder holds already are not computed again.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of an EvalConfig")
    parser.add_argument("--model", help="folder or hub name of a causal language model")
    parser.add_argument("--output", metavar="FOLDER", help="folder of the results")
    parser.add_argument("--question", help="visible or hidden while the cache is compressed")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any field, such as keep_ratios=[0.2,0.1]")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="make and check all rows, count them, and stop")
    # The DeepSpeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> EvalConfig:
    """The file, then the flags, then the overrides in the order given."""
    flags = [(name, getattr(args, name)) for name in ("model", "output", "question")]
    overrides = [(name, value) for name, value in flags if value is not None]
    return EvalConfig.load(args.config, overrides + [parse_override(text) for text in args.overrides])


def describe(plan: Plan) -> str:
    """Rows and prompt lengths of each task, a line each."""
    lines = []
    for task in plan.tasks:
        lengths = [job.num_prompt_tokens for job in plan.jobs if job.task is task]
        lines.append(f"{task.name}: {len(lengths)} rows, prompts of {min(lengths)} to {max(lengths)} tokens")
    return "\n".join([*lines, f"{len(plan.methods)} methods and budgets, {len(plan.jobs) * len(plan.methods)} results"])


def run(plan: Plan, show_progress: bool) -> Outcome:
    """Evaluate with a progress bar on the first rank."""
    mesh = build_mesh(dp=plan.config.parallel.replicas(read_environment().world_size))
    with tqdm(unit="result", file=sys.stderr, disable=None if show_progress else True) as bar:

        def on_start(count: int) -> None:
            bar.total = count
            bar.refresh()

        return evaluate(
            plan, mesh, on_start=on_start, on_results=bar.update, log=lambda line: tqdm.write(line, file=sys.stderr)
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, run, tear down; the exit status."""
    args = make_parser().parse_intermixed_args(argv)
    rank = 0
    try:
        launch = read_environment()
        rank = launch.rank
        config = read_config(args)
        check_parallel(config, launch.world_size)
        if args.print_config:
            print(dump_yaml(config.to_dict()) if rank == 0 else "", end="")
            return EXIT_OK
        plan = prepare(config, {ESSAYS: essays})
        if args.dry_run:
            print(describe(plan) if rank == 0 else "")
            return EXIT_OK
        init_distributed("gloo" if config.device == "cpu" else None, TIMEOUT_S)
        outcome = run(plan, show_progress=rank == 0)
    except (ValueError, FetchError) as error:
        print(f"evaluate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if outcome.interrupted:
        return EXIT_INTERRUPTED
    if outcome.table is not None:
        print(
            f"{outcome.table}\nresults in {outcome.folder}: {outcome.num_results} done, {outcome.num_missing} missing"
        )
    return EXIT_FAILED if outcome.num_missing else EXIT_OK
