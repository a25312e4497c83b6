"""For the library's developers, run from the repository's root: `python -m benchmarks` lists them.

Measurements that refuse to report on wrong results: a correctness gate first, then interleaved medians.
"""
