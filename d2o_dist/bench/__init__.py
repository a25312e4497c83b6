"""Measurements that refuse to report on wrong results: a correctness gate first, then interleaved medians."""
