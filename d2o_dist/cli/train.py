"""`launch/train.py`: fine-tuning at long context. Exit: 0 done, 1 failed, 2 bad usage, 130 interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from d2o_dist.cli.evaluate import load_essays
from d2o_dist.comm import build_mesh, init_distributed, run_guarded
from d2o_dist.config.eval_tasks import ESSAYS
from d2o_dist.config.io import dump_yaml
from d2o_dist.config.overrides import parse_override
from d2o_dist.config.train import TrainConfig
from d2o_dist.engine.model import pick_device
from d2o_dist.train.loop import prepare, train

EXIT_OK, EXIT_USAGE, EXIT_INTERRUPTED = 0, 2, 130


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune a model, with the compressed KV cache in the loop if wanted. Start one process by "
        "itself, or many with torchrun, deepspeed or srun. Flags and overrides take precedence over the file.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of a TrainConfig")
    parser.add_argument("--model", help="folder or hub name of a causal language model")
    parser.add_argument("--output", metavar="FOLDER", help="checkpoints, log and exported model")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any field, such as optimizer.lr=1e-5")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same, repeatable")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    # The DeepSpeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The file, then the flags, then the overrides in the order given."""
    overrides = [(name, value) for name in ("model", "output") if (value := getattr(args, name)) is not None]
    return TrainConfig.load(args.config, overrides + [parse_override(text) for text in [*args.overrides, *args.set]])


def run_ranks(config: TrainConfig) -> None:
    """Join the other ranks and train."""
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    launch = init_distributed("gloo" if on_cpu else None)
    if launch.world_size % config.sp:
        raise ValueError(f"world size ({launch.world_size}) must be a multiple of sp ({config.sp})")
    device = pick_device(config.device if launch.launcher == "none" or on_cpu else str(launch.device))
    if config.engine.name == "deepspeed" and launch.launcher == "none":
        raise ValueError('engine.name "deepspeed" needs a launcher: deepspeed launch/train.py, or torchrun')
    mesh = build_mesh(dp=launch.world_size // config.sp, sp=config.sp)
    state = train(prepare(config, mesh, device, {ESSAYS: load_essays}))
    if launch.rank == 0:
        print(f"done: {state.step} steps; the model is in {config.output}/model", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, train, tear down; the exit status."""
    args = make_parser().parse_intermixed_args(argv)
    try:
        config = read_config(args)
        if args.print_config:
            print(dump_yaml(config.to_dict()), end="")
            return EXIT_OK
    except ValueError as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    return run_guarded(lambda: _train(config))


def _train(config: TrainConfig) -> int:
    try:
        run_ranks(config)
    except ValueError as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        # Peers may be waiting for this rank: the status ends them, and `run_guarded` this process.
        raise SystemExit(EXIT_USAGE) from error
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    return EXIT_OK
