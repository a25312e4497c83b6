"""`d2o-dist profile MODEL`: measure once how the layers of a model share slots. Exit: 0 written, 2 bad usage."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from d2o_dist import __version__
from d2o_dist.cli.voice import parse_once
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.profile import default_text, measure_profile, passages
from d2o_dist.eval.text import read_text
from d2o_dist.models import loading
from d2o_dist.models.adapter_files import base_of
from d2o_dist.models.profile import write_profile

EXIT_OK, EXIT_USAGE = 0, 2


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="d2o-dist profile",
        description="Measure how the layers of a model share slots, for budget.rule profile. It reads a few passages "
        "of a text and writes a small file beside the model, or into your cache where that cannot be written.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name")
    parser.add_argument("--text", metavar="FILE", help="a text file of any kind; by default Python's own documentation")
    parser.add_argument("--passages", type=int, default=8, metavar="N", help="how many are read (8)")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="tokens of each (1024)")
    parser.add_argument("--revision", help="of the model on the hub")
    parser.add_argument("--dtype", default="auto", help="of the weights while measuring (auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    return parser


def _profile(args: argparse.Namespace) -> str:
    for name in ("passages", "tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} ({getattr(args, name)}) must be at least 1")
    if base := base_of(args.model):
        raise ValueError(f"{args.model} is an adapter: profile its base, {base}, which it is merged into")
    config = InferConfig(model=args.model, revision=args.revision, dtype=args.dtype, device=args.device)
    shape = loading.describe(config)
    if None not in shape.windows:
        raise ValueError(f"{args.model} has sliding windows in all of its layers, and none of these shares slots")
    text = default_text() if args.text is None else read_text(Path(args.text))
    tokens = min(args.tokens, shape.max_positions or args.tokens)
    ids = loading.load_tokenizer(config)(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = passages(ids, args.passages, tokens)
    profile = measure_profile(
        loading.load_model(config), rows, args.model, shape.revision,
        text=args.text or "pydoc_data.topics", text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        version=__version__,
    )  # fmt: skip
    path = write_profile(args.model, profile)
    most, least = max(profile.shares) * len(profile.shares), min(profile.shares) * len(profile.shares)
    return (
        f"{path}: {len(profile.shares)} layers, {len(rows)} passages of {tokens} tokens; a layer gets {least:.2f} to "
        f"{most:.2f} times the average"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, write; the exit status."""
    args = parse_once(make_parser(), argv, True)
    if isinstance(args, int):
        return args
    try:
        with loading.quiet():
            line = _profile(args)
    except ValueError as error:
        print(f"d2o-dist profile: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    print(line)
    return EXIT_OK
