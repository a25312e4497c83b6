"""`launch/train.py`: fine-tuning at long context. Exit: 0 done, 1 failed or diverged, 2 bad usage, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from d2o_dist.cli.evaluate import load_essays
from d2o_dist.cli.voice import parse_once, speaks_of
from d2o_dist.comm import Launch, build_mesh, init_distributed, read_environment, run_guarded
from d2o_dist.comm.agreement import AgreedError
from d2o_dist.comm.launch import SECONDARY_DELAY_S
from d2o_dist.config.eval_tasks import ESSAYS
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.train import TrainConfig
from d2o_dist.engine.lock import only_writer
from d2o_dist.engine.paths import check_apart, check_outside, inputs_of
from d2o_dist.engine.startup import check_same_run
from d2o_dist.eval.evaluate import data_of
from d2o_dist.fields.io import dump_yaml
from d2o_dist.fields.overrides import parse_override
from d2o_dist.models.device import pick_device
from d2o_dist.train.log import LOG_FILE
from d2o_dist.train.loop import Diverged, Run, prepare, train

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# In `output`, while a run writes there.
LOCK = ".lock"


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


def model_of(config: TrainConfig) -> InferConfig:
    """The names of model and tokenizer."""
    return InferConfig(
        model=config.model, tokenizer=config.tokenizer, revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip


def check_output(config: TrainConfig, config_file: str | None) -> None:
    """Refuse an output in which the run would replace what it reads, or what no run has written.

    Raises:
        ValueError: names both.
    """
    output = Path(config.output).expanduser()
    inputs = list(inputs_of(model_of(config), config_file))
    data = (config.data.train, config.data.validation)
    inputs += [("the data", Path(path).expanduser()) for path in data if path is not None]
    inputs += data_of(config.eval_tasks)
    check_apart(output / LOG_FILE, inputs)
    for name in ("model", "model-best", "checkpoints"):
        check_outside(output / name, inputs)
    if (output / LOG_FILE).exists() or (output / "checkpoints").is_dir():
        return
    for name in ("model", "model-best"):
        if os.path.lexists(output / name):
            raise ValueError(
                f"{output / name} would be replaced, and no run wrote it, for {output} has neither {LOG_FILE} nor "
                "checkpoints: name another output"
            )


def prepare_ranks(config: TrainConfig, held: ExitStack) -> Run:
    """Join the other ranks, and make everything ready. No other run writes to `output` until `held` is closed."""
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    launch = init_distributed("gloo" if on_cpu else None, config.timeout)
    if launch.world_size % config.sp:
        raise ValueError(f"world size ({launch.world_size}) must be a multiple of sp ({config.sp})")
    device = pick_device(config.device)
    if config.engine.name == "deepspeed" and launch.launcher == "none":
        raise ValueError('engine.name "deepspeed" needs a launcher: deepspeed launch/train.py, or torchrun')
    check_same_run(build_mesh(dp=launch.world_size), config.to_dict(), model_of(config))
    mesh = build_mesh(dp=launch.world_size // config.sp, sp=config.sp)
    output = Path(config.output).expanduser()
    held.enter_context(only_writer(config.output, output / LOCK, mesh))
    return prepare(config, mesh, device, {ESSAYS: load_essays})


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, train, tear down; the exit status. One rank speaks."""
    launch = Launch()
    try:
        launch = read_environment()
        args = parse_once(make_parser(), argv, launch.local_rank == 0)
        if isinstance(args, int):
            return args
        config = read_config(args)
        check_output(config, args.config)
    except ValueError as error:
        if speaks_of(error, launch, met=False):
            _say(error)
        return EXIT_USAGE
    if args.print_config:
        print(dump_yaml(config.to_dict()) if launch.rank == 0 else "", end="")
        return EXIT_OK
    return run_guarded(lambda: _train(config, launch))


def _say(error: Exception) -> None:
    print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)


def _train(config: TrainConfig, launch: Launch) -> int:
    with ExitStack() as held:
        try:
            try:
                run = prepare_ranks(config, held)
            except AgreedError as error:
                if speaks_of(error, launch, met=True):
                    _say(error)
                return EXIT_USAGE
            except ValueError as error:
                # Most often all ranks have it. Where the first has, the launcher ends the others before they repeat it.
                if launch.rank != 0:
                    time.sleep(SECONDARY_DELAY_S)
                _say(error)
                # Peers may be waiting for this rank: the status ends them, and `run_guarded` this process.
                raise SystemExit(EXIT_USAGE) from error
            state = train(run)
        except Diverged as error:
            if launch.rank == 0:
                _say(error)
            return EXIT_FAILED
        except KeyboardInterrupt:
            raise SystemExit(EXIT_INTERRUPTED) from None
    if launch.rank == 0:
        print(f"done: {state.step} steps; the model is in {config.output}/model", file=sys.stderr)
    return EXIT_OK
