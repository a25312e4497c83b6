"""Benchmarks: `python launch/bench.py layers --groups decode --length 32768`; `python launch/bench.py` lists them."""

from d2o_dist.bench.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
