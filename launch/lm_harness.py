"""lm-evaluation-harness with a compressed cache: `python launch/lm_harness.py run --model d2o_dist ...`; see --help."""

from d2o_dist.cli.lm_harness import main

if __name__ == "__main__":
    raise SystemExit(main())
