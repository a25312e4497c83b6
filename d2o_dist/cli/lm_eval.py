"""`launch/lm_eval.py`: the command line of lm-evaluation-harness, to which `--model d2o_dist` is known."""

from __future__ import annotations

import sys


def main() -> int:
    """Register the model and hand over to the harness, which reads the command line."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from d2o_dist.eval.lm_eval import register
    except ImportError as error:
        print(f"lm_eval.py: error: this needs lm-eval (pip install lm-eval): {error}", file=sys.stderr)
        return 2
    register()
    cli_evaluate()
    return 0
