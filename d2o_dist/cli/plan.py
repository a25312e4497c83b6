"""`d2o-dist plan`: which mesh for a model, a context and some GPUs. Exit: 0 a mesh fits, 1 none does, 2 bad usage.

It loads no weights and needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from d2o_dist.cli.voice import parse_once, quiet_unless
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.fields.checks import check_int
from d2o_dist.fields.io import build, dump_yaml
from d2o_dist.fields.overrides import parse_override
from d2o_dist.models.loading import describe
from d2o_dist.plan import table
from d2o_dist.plan.gpus import find_gpu
from d2o_dist.plan.memory import reading_of, rules_of
from d2o_dist.plan.model_size import config_of, known_models, size_of
from d2o_dist.plan.planner import AIMS, MeshPlan, Workload, plan_all
from d2o_dist.plan.seconds import Assumptions

EXIT_OK, EXIT_NO_ROOM, EXIT_USAGE = 0, 1, 2
# Prompt tokens of one forward, where the configuration does not say: the activations of a long prompt are many.
CHUNK = 16384


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="d2o-dist plan",
        description="Memory, time and traffic of every legal dp x sp x tp of some GPUs, calculated; the best first.",
    )
    known = ", ".join(known_models())
    parser.add_argument("--model", help=f"folder, config.json, hub name, or one of: {known}")
    parser.add_argument("--context", type=int, required=True, metavar="N", help="tokens of a prompt")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows of a batch, on each replica (1)")
    parser.add_argument("--gpu", required=True, help="a name of d2o_dist/plan/gpus.yaml or of --gpu-file")
    parser.add_argument("--gpu-file", metavar="FILE", help="YAML of more GPUs, in the form of gpus.yaml")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many (1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="how many share a node (8)")
    parser.add_argument("--preset", help="named D2O configuration, such as d2o, lean, full")
    parser.add_argument("--keep-ratio", help="fraction of the cache to keep, in (0, 1]")
    parser.add_argument("--aim", default="latency", choices=AIMS, help="what is ranked by (latency)")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="meshes that are shown (8)")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="as in matmul=0.6")
    parser.add_argument("--markdown", action="store_true", help="the table of meshes and nothing else, as Markdown")
    parser.add_argument("--config", metavar="FILE", help="YAML of an InferConfig to start from")
    parser.add_argument("--write", metavar="FILE", help="write the best mesh's configuration for launch/infer.py")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any field of an InferConfig")
    return parser


def read_config(args: argparse.Namespace) -> InferConfig:
    """What the run would be told, but for the sizes of its mesh."""
    overrides: list[tuple[str, Any]] = []
    if args.model is not None:
        path = Path(args.model)
        is_file = path.name == "config.json" and path.is_file()
        overrides.append(("model", str(path.parent) if is_file else args.model))
    if args.preset is not None:
        overrides.append(("d2o.preset", args.preset))
    if args.keep_ratio is not None:
        overrides.append(parse_override(f"d2o.keep_ratio={args.keep_ratio}"))
    overrides += [parse_override(text) for text in args.overrides]
    config = InferConfig.load(args.config, overrides)
    return config if config.prefill_chunk else dataclasses.replace(config, prefill_chunk=CHUNK)


def make_workload(args: argparse.Namespace, config: InferConfig) -> Workload:
    """The model, the request and the GPUs."""
    assume = dict(parse_override(text) for text in args.assume)
    with quiet_unless(False):
        model_config = config_of(config)
        model = size_of(model_config)
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else model_config.dtype or torch.float32
    new_tokens, d2o = config.sampling.max_new_tokens, rules_of(model, config.d2o)
    work = Workload(
        model=model, d2o=d2o, gpu=find_gpu(args.gpu, args.gpu_file), tokens=args.context, new_tokens=new_tokens,
        batch=args.batch, chunk=config.prefill_chunk, reading=reading_of(config.reading, model, d2o),
        dtype=dtype, num_gpus=args.gpus, gpus_per_node=args.gpus_per_node, assume=build(Assumptions, assume),
    )  # fmt: skip
    most = model.max_positions
    if most is not None and args.context + new_tokens > most:
        print(
            f"warning: context ({args.context}) and max_new_tokens ({new_tokens}) are together above the model's "
            f"max_position_embeddings ({most}): this is what it would take if it had the positions",
            file=sys.stderr,
        )
    return work


def _parallel(config: InferConfig) -> ParallelConfig:
    """What all meshes share. Megatron cuts what transformers' plan cuts, whatever engine the run names."""
    if config.model_kind == "transformers":
        return config.parallel
    return dataclasses.replace(config.parallel, tp_engine="transformers")


def _check(config: InferConfig, mesh: ParallelConfig) -> None:
    """Refuse what Megatron cannot divide; of other models the planner checks what a run does."""
    if config.model_kind == "megatron":
        describe(dataclasses.replace(config, parallel=mesh))


def configuration(config: InferConfig, work: Workload, plan: MeshPlan) -> InferConfig:
    """The configuration of the run on this mesh."""
    share = plan.share
    asked = dataclasses.replace(config.parallel, dp=plan.dp, sp=share.sp, tp=share.tp)
    return dataclasses.replace(
        config,
        model=known_models().get(config.model, {"hub": config.model})["hub"],
        parallel=asked,
        max_batch_size=work.batch,
        max_batch_tokens=work.batch * work.tokens,
    )


def write_configuration(path: Path, config: InferConfig, work: Workload, plan: MeshPlan) -> None:
    """The YAML, with the commands that start it."""
    commands = "".join(f"#   {command}\n" for command in table.launch_commands(work, str(path)))
    text = f"# {work.num_gpus} GPUs as dp {plan.dp} x sp {plan.share.sp} x tp {plan.share.tp}:\n{commands}"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text + dump_yaml(configuration(config, work, plan).to_dict()))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, calculate, print; the exit status."""
    args = parse_once(make_parser(), argv, True)
    if isinstance(args, int):
        return args
    try:
        check_int("top", args.top, low=1)
        config = read_config(args)
        work = make_workload(args, config)
        plans, refused = plan_all(work, _parallel(config), args.aim, lambda mesh: _check(config, mesh))
        if not plans:
            raise ValueError(f"no mesh of {work.num_gpus} GPUs is legal: {table.refusals(refused)}")
        fits = plans[0].fits
        if args.write is not None and fits:
            write_configuration(Path(args.write), config, work, plans[0])
    except ValueError as error:
        print(f"d2o-dist plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    print(table.meshes_table(plans[: args.top], markdown=args.markdown))
    if not args.markdown:
        print(f"\n{table.details(work, plans[0])}\n")
        print(f"illegal:\n{table.refusals(refused)}\n" if refused else "", end="")
        print(table.assumptions(work))
        if fits:
            print("\n" + "\n".join(table.launch_commands(work, args.write or "CONFIG")))
    if not fits:
        least = min(plan.memory.peak for plan in plans) / 2**30
        print(
            f"no mesh fits: the least that a GPU needs is {least:.1f} GiB of {work.room / 2**30:.1f} GiB. Take more "
            "GPUs, a smaller batch or a shorter context",
            file=sys.stderr,
        )
    return EXIT_OK if fits else EXIT_NO_ROOM
