"""lm-evaluation-harness: `python launch/lm_eval.py run --model d2o_dist --model_args pretrained=PATH,preset=mass`."""

from d2o_dist.cli.lm_eval import main

if __name__ == "__main__":
    raise SystemExit(main())
