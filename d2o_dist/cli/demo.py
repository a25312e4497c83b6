"""`make demo`: a small real model answers questions about a long real text, with the full cache and with D2O."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.config.infer import InferConfig
from d2o_dist.demo.compare import answer_all, table
from d2o_dist.demo.fetch import FetchError
from d2o_dist.demo.model import prepare_model
from d2o_dist.demo.question import build_questions
from d2o_dist.demo.text import essays
from d2o_dist.engine.model import load_model, load_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what is missing, run, print."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--tokens", type=int, default=3500, help="length of each prompt (default: 3500)")
    parser.add_argument("--keep-ratio", type=float, default=0.2, help="fraction of the cache to keep (default: 0.2)")
    parser.add_argument("--presets", default="d2o,mass", help="what to run beside the full cache (default: d2o,mass)")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args(argv)
    try:
        methods = {"full": D2OConfig.preset("full")}
        for name in args.presets.split(","):
            methods[name] = D2OConfig.preset(name, keep_ratio=args.keep_ratio)
        config = InferConfig(model=str(prepare_model()), dtype="float32", prompt="-")
        tokenizer, model = load_tokenizer(config), load_model(config)
        questions = build_questions(tokenizer, essays(), args.tokens)
    except (ValueError, FetchError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    print(f"{config.model}: {model.config.num_hidden_layers} layers, prompts of {args.tokens} tokens of real essays\n")
    answers = []
    for answer in answer_all(model, tokenizer, questions, methods, args.max_new_tokens):
        if answer.method == "full":
            question = answer.question
            print(f"{question.question}  (told {question.depth:.0%} into {question.num_tokens} tokens)")
        shown = " ".join(answer.text.split())[:70]
        print(f"  {answer.method:<10} {'right' if answer.is_right else 'wrong'}  {shown}", flush=True)
        answers.append(answer)
    print(f"\n{answers[-1].report}\n\n{table(answers)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
