"""Evaluation: `python launch/evaluate.py --config configs/eval_smollm2.yaml`, or under torchrun; see --help."""

from d2o_dist.cli.evaluate import main
from d2o_dist.comm import run_guarded

if __name__ == "__main__":
    raise SystemExit(run_guarded(main))
