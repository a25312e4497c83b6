"""Training: `deepspeed launch/train.py --config configs/train_distill_smollm2.yaml`; see --help."""

from d2o_dist.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
