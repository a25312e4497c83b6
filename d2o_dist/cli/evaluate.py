"""`launch/evaluate.py`: tasks x methods x budgets.

Exit: 0 all results, 1 some failed, 2 bad usage, 75 stopped by a signal (the same command goes on), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from d2o_dist.cli.voice import parse_once, quiet_unless, speaks_of
from d2o_dist.comm import Launch, ParallelMesh, build_mesh, init_distributed, read_environment
from d2o_dist.comm.launch import tell_launcher
from d2o_dist.config.eval_tasks import ESSAYS
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.engine.startup import check_same_run
from d2o_dist.engine.stop import Stop, StoppedError
from d2o_dist.eval.essays import essays
from d2o_dist.eval.evaluate import Outcome, check_parallel, evaluate
from d2o_dist.eval.fetch import FetchError
from d2o_dist.eval.plan import EvalPlan, prepare
from d2o_dist.eval.rows import write_rows
from d2o_dist.fields.io import dump_yaml
from d2o_dist.fields.overrides import parse_override

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def load_essays() -> str:
    """The text `essays`, by name.

    Raises:
        ValueError: they are not here and cannot be fetched.
    """
    try:
        return essays()
    except FetchError as error:
        raise ValueError(str(error)) from error


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
    parser.add_argument("--rows-to", metavar="FILE", help="write all rows as JSON lines, for other programs, and stop")
    # The DeepSpeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> EvalConfig:
    """The file, then the flags, then the overrides in the order given."""
    flags = [(name, getattr(args, name)) for name in ("model", "output", "question")]
    overrides = [(name, value) for name, value in flags if value is not None]
    return EvalConfig.load(args.config, overrides + [parse_override(text) for text in args.overrides])


def describe(plan: EvalPlan) -> str:
    """Rows and prompt lengths of each task, a line each."""
    lines = []
    for task in plan.tasks:
        lengths = [job.num_prompt_tokens for job in plan.jobs if job.task is task]
        lines.append(f"{task.name}: {len(lengths)} rows, prompts of {min(lengths)} to {max(lengths)} tokens")
    return "\n".join([*lines, f"{len(plan.methods)} methods and budgets, {len(plan.jobs) * len(plan.methods)} results"])


def run(plan: EvalPlan, mesh: ParallelMesh, config_file: str | None = None) -> Outcome:
    """Evaluate, with a progress bar on the first rank.

    Raises:
        StoppedError: a signal said so.
    """
    stop, said = Stop(), "the running batch ends, and finished results stay" if mesh.rank == 0 else None
    with stop.on_signals(said), tqdm(unit="result", file=sys.stderr, disable=None if mesh.rank == 0 else True) as bar:

        def on_start(count: int) -> None:
            bar.total = count
            bar.refresh()

        return evaluate(
            plan, mesh, config_file=config_file, on_start=on_start, on_results=bar.update,
            log=lambda line: tqdm.write(line, file=sys.stderr), stop=stop,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, run, tear down; the exit status, the same on all ranks. One rank speaks."""
    launch, mesh = Launch(), None

    def refuse(error: Exception) -> int:
        if speaks_of(error, launch, met=mesh is not None):
            print(f"evaluate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE

    try:
        launch = read_environment()
        args = parse_once(make_parser(), argv, launch.local_rank == 0)
        if isinstance(args, int):
            return args
        config = read_config(args)
        dp = check_parallel(config, launch.world_size)
        if args.print_config:
            print(dump_yaml(config.to_dict()) if launch.rank == 0 else "", end="")
            return EXIT_OK
        init_distributed("gloo" if config.device == "cpu" else None, config.parallel.timeout)
        check_same_run(build_mesh(launch.world_size), config.to_dict(), config.infer())
        mesh = build_mesh(dp, config.parallel.sp, config.parallel.tp)
        with quiet_unless(mesh.rank == 0):
            plan = prepare(config, {ESSAYS: load_essays}, mesh)
            if args.dry_run or args.rows_to is not None:
                if args.rows_to is not None and mesh.rank == 0:
                    write_rows(plan, Path(args.rows_to).expanduser())
                print(f"{describe(plan)}\n" if mesh.rank == 0 else "", end="")
                return EXIT_OK
            outcome = run(plan, mesh, args.config)
    except ValueError as error:
        return refuse(error)
    except StoppedError as stopped:
        print(f"evaluate.py: {stopped}\n" if str(stopped) else "", end="", file=sys.stderr)
        tell_launcher(f"status {stopped.status}: {str(stopped) or 'see the first rank'}")
        return stopped.status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if outcome.interrupted:
        return EXIT_INTERRUPTED
    if outcome.table is not None:
        counts = f"{outcome.num_results} done, {outcome.num_missing} missing"
        print(f"{outcome.table}\nresults in {outcome.folder}: {counts}")
    return EXIT_FAILED if outcome.num_missing else EXIT_OK
