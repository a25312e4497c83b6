"""`make demo`: a small real model answers questions about a long real text, with the full cache and with D2O.

Under torchrun the ranks share the tokens of every prompt (`sp`), and one of them speaks; alone it is one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from d2o_dist.cli.voice import parse_once, quiet_unless
from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.launch import init_distributed, read_environment, run_guarded
from d2o_dist.comm.mesh import ParallelMesh, build_mesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.startup import check_same_run
from d2o_dist.eval.essays import essays
from d2o_dist.eval.fetch import FetchError
from d2o_dist.models.loading import load_model, load_tokenizer
from d2o_dist.policy.config import D2OConfig
from launch.demo.compare import answer_all, table
from launch.demo.model import prepare_model
from launch.demo.question import build_questions


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what is missing, run, print."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--tokens", type=int, default=3500, help="length of each prompt (default: 3500)")
    parser.add_argument("--keep-ratio", type=float, default=0.2, help="fraction of the cache to keep (default: 0.2)")
    presets = "snapkv,paper,d2o"
    parser.add_argument("--presets", default=presets, help=f"beside the full cache (default: {presets})")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    launch = read_environment()
    args = parse_once(parser, argv, launch.rank == 0)
    if isinstance(args, int):
        return args
    # A GPU each, or the CPU.
    device = "auto" if torch.cuda.device_count() >= launch.world_size else "cpu"
    init_distributed("gloo" if device == "cpu" else None)
    parallel = ParallelConfig(sp=launch.world_size)
    mesh = build_mesh(sp=parallel.sp)
    speaks = mesh.rank == 0
    try:
        methods = {"full": D2OConfig.preset("full")}
        for name in args.presets.split(","):
            methods[name] = D2OConfig.preset(name, keep_ratio=args.keep_ratio)
        folder, text = fetch_once(mesh)
        config = InferConfig(model=folder, dtype="float32", device=device, prompt="-", parallel=parallel)
        check_same_run(mesh, vars(args), config)
        with quiet_unless(speaks):
            tokenizer, model = load_tokenizer(config), load_model(config, mesh)
        questions = build_questions(tokenizer, text, args.tokens)
    except ValueError as error:
        if speaks:
            print(f"demo: error: {error}", file=sys.stderr)
        return 2

    def say(line: str) -> None:
        if speaks:
            print(line, flush=True)

    say(
        f"{config.model}: {len(model.shape.windows)} layers, prompts of {args.tokens} tokens of real essays, "
        f"on {parallel.sp} rank{'s' if parallel.sp > 1 else ''}\n"
    )
    answers = []
    for answer in answer_all(model, tokenizer, questions, methods, args.max_new_tokens, mesh, parallel):
        if answer.method == "full":
            question = answer.question
            say(f"{question.question}  (told {question.depth:.0%} into {question.num_tokens} tokens)")
        shown = " ".join(answer.text.split())[:70]
        say(f"  {answer.method:<10} {'right' if answer.is_right else 'wrong'}  {shown}")
        answers.append(answer)
    say(f"\n{answers[-1].report}\n\n{table(answers)}")
    return 0


def fetch_once(mesh: ParallelMesh) -> tuple[str, str]:
    """The model's folder and the essays, fetched by rank 0 while the others wait.

    Raises:
        ValueError: they cannot be had; on all ranks.
    """
    found: tuple[str, str] | str = ""
    if mesh.rank == 0:
        try:
            found = str(prepare_model()), essays()
        except FetchError as error:
            found = str(error)
    found = Collectives(mesh.axis("world")).broadcast_object(found)
    if isinstance(found, str):
        raise ValueError(found)
    return found


if __name__ == "__main__":
    sys.exit(run_guarded(main))
