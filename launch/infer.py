"""Inference: `python launch/infer.py --config configs/infer_smollm2.yaml --prompt "Hello"`; see --help."""

from d2o_dist.cli.infer import main

if __name__ == "__main__":
    raise SystemExit(main())
