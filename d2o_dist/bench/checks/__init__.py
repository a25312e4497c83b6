"""Every Triton kernel against its oracle, on awkward shapes: run on a GPU by `gpu_check`, interpreted by the tests.

The kernels' own files are imported when a check runs, so listing checks needs no Triton.
"""

from d2o_dist.bench.checks import (
    column_peaks,
    column_sums,
    decode,
    dispatch,
    merge_into,
    nearest_kept,
    prefill,
    update_scores,
)
from d2o_dist.bench.checks.common import Check, Result

__all__ = ["Check", "Result", "all_checks"]


def all_checks() -> list[Check]:
    """All of them, op by op; names are unique."""
    modules = (prefill, column_sums, column_peaks, decode, update_scores, nearest_kept, merge_into, dispatch)
    return [check for module in modules for check in module.checks()]
