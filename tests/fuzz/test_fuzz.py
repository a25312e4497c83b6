"""A few hundred of what `python -m tests.fuzz` tries, always the same."""

from __future__ import annotations

from tests.fuzz.__main__ import run
from tests.fuzz.checks import seen


def test_what_nobody_would_write_is_refused_in_short_or_taken_as_it_is():
    seen.clear()
    run(300, derandomize=True)
    assert sum(seen.values()) >= 250 and min(seen.values()) > 0 and len(seen) == 6
