"""Inference: `python launch/infer.py --config configs/infer_smollm2.yaml --prompt "Hello"`; see --help."""

from d2o_dist.cli.infer import main
from d2o_dist.comm.launch import run_guarded

if __name__ == "__main__":
    raise SystemExit(run_guarded(main))
