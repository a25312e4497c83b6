"""`d2o-dist convert`: weights of Hugging Face as a Megatron checkpoint, and back. Exit: 0 done, 2 bad usage.

One process, on the CPU; it holds the model twice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2o_dist.cli.voice import parse_once, quiet_unless
from d2o_dist.config.infer import MODEL_KINDS
from d2o_dist.config.megatron import ARGUMENTS
from d2o_dist.models.convert import convert

EXIT_OK, EXIT_USAGE = 0, 2


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="d2o-dist convert",
        description="Llama, Mistral, Qwen2 and Qwen3 from a folder of transformers to one of Megatron, and back.",
    )
    parser.add_argument("source", metavar="SOURCE", help=f"a Hugging Face model, or a folder with a {ARGUMENTS}")
    parser.add_argument("output", metavar="OUTPUT", help="a new folder")
    parser.add_argument("--to", required=True, choices=MODEL_KINDS, help="the library that is to read the output")
    parser.add_argument(
        "--trust-pickled-weights", action="store_true", help="read pickles that may run what they name"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, say what reads the output; the exit status."""
    args = parse_once(make_parser(), argv, True)
    if isinstance(args, int):
        return args
    try:
        with quiet_unless(False):
            convert(args.source, args.output, args.to, trust_pickled_weights=args.trust_pickled_weights)
    except ValueError as error:
        print(f"d2o-dist convert: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    how = f"model={args.output} tokenizer={args.source} model_kind={args.to}"
    print(f"wrote {args.output}, to be read with {how if args.to == 'megatron' else f'model={args.output}'}")
    return EXIT_OK
