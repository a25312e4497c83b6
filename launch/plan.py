"""Planning: `python launch/plan.py --model llama-3-8b --context 130000 --gpu h100-80gb --gpus 8`; see --help."""

from d2o_dist.cli.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
