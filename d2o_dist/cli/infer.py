"""`launch/infer.py`: prompts in, results out.

Exit: 0 all rows ok, 1 some failed, 2 bad usage, 75 stopped by a signal (the same command goes on), 130 interrupted.

The same program is one process by itself, or one rank of many under torchrun, deepspeed or srun.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from d2o_dist.cli.voice import parse_once, quiet_unless, speaks_of
from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.launch import Launch, init_distributed, read_environment, tell_launcher, traces_beside
from d2o_dist.comm.mesh import ParallelMesh, build_mesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.plan import InferPlan, prepare
from d2o_dist.engine.room import memory_comment
from d2o_dist.engine.runner import run
from d2o_dist.engine.startup import check_same_run
from d2o_dist.engine.stop import STATUS_UNWRITTEN, Stop, StoppedError
from d2o_dist.engine.summary import Summary
from d2o_dist.fields.io import dump_yaml
from d2o_dist.fields.overrides import parse_override
from d2o_dist.files.whole import reason

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
    parser.add_argument("--preset", help="named D2O configuration, such as d2o, lean, full")
    parser.add_argument("--keep-ratio", help="fraction of the cache to keep, in (0, 1]")
    parser.add_argument("--tp", type=int, metavar="N", help="ranks that share the heads of a request")
    parser.add_argument("--sp", type=int, metavar="N", help="ranks that share the tokens of a request")
    parser.add_argument("--dp", type=int, metavar="N", help="replicas; what the ranks allow, if not given")
    parser.add_argument("--trace", metavar="FOLDER", help="write collective counts and a profile of a decode step")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any field, such as sampling.top_p=0.9")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same, repeatable")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    # The DeepSpeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> InferConfig:
    """The file, then the flags, then the overrides in the order given."""
    fields = {name: name for name in ("model", "output", "trace")} | {f"parallel.{n}": n for n in ("tp", "sp", "dp")}
    overrides = [(key, value) for key, name in fields.items() if (value := getattr(args, name)) is not None]
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


def run_plan(config: InferConfig, plan: InferPlan, mesh: ParallelMesh, stop: Stop) -> Summary:
    """Run with the right display on rank 0: text as it comes and the cache's report, or a progress bar and JSONL."""
    one = plan.num_rows == 1 and mesh.dp == 1
    on_terminal = config.stream == "auto" and one and sys.stdout.isatty() and config.output != "-"
    # A report is made by all ranks of a request together, so it is rank 0's terminal that decides for them.
    streams = Collectives(mesh.axis("world")).broadcast_object(config.stream is True or on_terminal)
    if mesh.rank != 0:
        return run(config, plan, mesh, on_report=(lambda report: None) if streams else None, stop=stop)

    def log(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def show(piece: str) -> None:
        try:
            print(piece, end="", flush=True)
        except OSError as error:
            stop.ask(STATUS_UNWRITTEN, f"standard output cannot be written: {reason(error)}")

    if streams:
        return run(
            config, plan, mesh, on_text=show, on_report=lambda report: show(f"\n\n{report}\n"), log=log, stop=stop
        )
    with tqdm(total=plan.num_rows, unit="row", file=sys.stderr, disable=None) as bar:
        return run(config, plan, mesh, on_rows=bar.update, log=log, stop=stop)


def work(config: InferConfig, plan: InferPlan, mesh: ParallelMesh) -> int:
    """Run, and say on rank 0 how it ended; the status, the same on all ranks.

    Raises:
        ValueError: see `engine.runner.run`.
    """
    stop = Stop()
    with stop.on_signals("the running step ends, and finished rows stay" if mesh.rank == 0 else None):
        try:
            summary = run_plan(config, plan, mesh, stop)
        except StoppedError as stopped:
            print(f"infer.py: {stopped}\n" if str(stopped) else "", end="", file=sys.stderr)
            tell_launcher(f"status {stopped.status}: {str(stopped) or 'see the first rank'}")
            _give_up_stdout()
            return stopped.status
        if mesh.rank == 0:
            print(summary, file=sys.stderr)
            for line in summary.lost:
                print(f"infer.py: error: {line}", file=sys.stderr)
        if summary.interrupted:
            return EXIT_INTERRUPTED
        if not summary.num_failed and not summary.lost:
            return EXIT_OK
        tell_launcher(f"status {EXIT_FAILED}: {summary.rows()}" + "".join(f"; {line}" for line in summary.lost))
        # A launcher ends the others once one of them has failed: not before rank 0 has spoken.
        Collectives(mesh.axis("world")).barrier()
        return EXIT_FAILED


def _give_up_stdout() -> None:
    """Where nobody reads it any more, Python would say so at its exit, and change the status."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, run, tear down; the exit status, the same on all ranks. One rank speaks."""
    launch, mesh = Launch(), None

    def refuse(error: ValueError) -> int:
        said = " ".join(str(error).split())
        if speaks_of(error, launch, met=mesh is not None):
            print(f"infer.py: error: {said}", file=sys.stderr)
        tell_launcher(f"status {EXIT_USAGE}: {said}")
        return EXIT_USAGE

    try:
        launch = read_environment()
        args = parse_once(make_parser(), argv, launch.local_rank == 0)
        if isinstance(args, int):
            return args
        config = read_config(args)
        if args.print_config:
            text = "" if launch.rank else dump_yaml(config.to_dict()) + memory_comment(config)
            print(text, end="")
            return EXIT_OK
        dp = config.parallel.replicas(launch.world_size)
        traces_beside(None if config.output == "-" else config.output)
        init_distributed("gloo" if config.device == "cpu" else None, config.parallel.timeout)
        check_same_run(build_mesh(launch.world_size), config.to_dict(), config)
        mesh = build_mesh(dp, config.parallel.sp, config.parallel.tp)
        with quiet_unless(mesh.rank == 0):
            plan = prepare(config, mesh, args.config)
            for line in plan.notices() if mesh.rank == 0 else ():
                print(f"warning: {line}", file=sys.stderr)
            return work(config, plan, mesh)
    except ValueError as error:
        return refuse(error)
    except OSError as error:
        if launch.world_size > 1:
            raise  # the others wait for this rank: its end is theirs
        return refuse(ValueError(f"{error.filename or 'a file'}: {reason(error)}"))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
