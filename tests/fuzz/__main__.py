"""`python -m tests.fuzz --examples 100000`: how many were taken and refused, or the smallest example that fails."""

from __future__ import annotations

import argparse
import sys
import time

from hypothesis import HealthCheck, given, settings

from tests.fuzz.checks import check_config, check_overrides, check_row, seen
from tests.fuzz.given import configurations, overrides, rows


def run(examples: int, *, derandomize: bool = False) -> None:
    """A half of the examples are configurations, a quarter overrides, a quarter rows.

    Raises:
        AssertionError, or what was not to be raised: on the smallest example that was found.
    """
    tried = (
        (check_config, examples - 2 * (examples // 4), configurations()),
        (lambda three: check_overrides(*three), examples // 4, overrides()),
        (check_row, examples // 4, rows()),
    )
    for check, count, strategy in tried:
        options = settings(
            max_examples=count, derandomize=derandomize, database=None, deadline=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        options(given(strategy)(check))()


def main() -> int:
    """Run them; exit 1 with hypothesis's account of what failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    args = parser.parse_args()
    began = time.perf_counter()
    run(args.examples)
    for name, count in sorted(seen.items()):
        print(f"{name}: {count}")
    print(f"{sum(seen.values())} examples in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
