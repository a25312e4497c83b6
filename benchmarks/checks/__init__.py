"""Every kernel against its oracle, on awkward shapes: run on a GPU by `gpu_check`, and by the tests without one.

The kernels' own files are imported when a check runs, so listing checks does not need Triton.
And CUDA graphs of decode steps beside the steps themselves, which need a GPU.
"""

from benchmarks.checks import (
    column_peaks,
    column_sums,
    decode,
    decode_graph,
    dispatch,
    finish_decode,
    launches,
    merge_into,
    merge_rules,
    nearest_kept,
    prefill,
    scored_decode,
)
from benchmarks.checks.common import Check, Result

__all__ = ["Check", "Result", "all_checks"]


def all_checks() -> list[Check]:
    """All of them, op by op; names are unique."""
    modules = (
        prefill, column_sums, column_peaks, decode, finish_decode, scored_decode, nearest_kept, merge_into, merge_rules,
        dispatch, launches, decode_graph,
    )  # fmt: skip
    return [check for module in modules for check in module.checks()]
