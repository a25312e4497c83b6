"""What a whole run did, in a few numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from d2o_dist.engine.records import Record

# Of one row: seconds to its first token, and its tokens a second, None for one token; see `engine.loop.Generated`.
Times = tuple[float, float | None]


@dataclass(frozen=True)
class Summary:
    """Totals and medians over the rows that ran; None where no row gives a value.

    Attributes:
        num_ok, num_failed, num_missing: rows with a result, with an error, and not reached (the run was interrupted).
        num_earlier: of the first two, those that an earlier run of the job had finished. They count in what is held
            and in the keep ratio, not in tokens and times.
        num_prompt_tokens, num_new_tokens: totals.
        wall_s: seconds from the first row to the last; new_tokens_per_s: of all rows together, prefills included.
        median_time_to_first_token_s, median_tokens_per_s: over rows.
        mean_keep_ratio: achieved, over rows.
        held_bytes, full_bytes: keys and values of all rows, each when it ended, and what full caches would have held.
        rank_bytes: by rank, the buffers of the largest cache that decoded: room to grow, positions and statistics
            included.
        lost: what happened to files that results were written to, and where the results are; empty if nothing did.
    """

    num_ok: int
    num_failed: int
    num_missing: int
    num_earlier: int
    num_prompt_tokens: int
    num_new_tokens: int
    wall_s: float
    median_time_to_first_token_s: float | None
    median_tokens_per_s: float | None
    mean_keep_ratio: float | None
    held_bytes: int
    full_bytes: int
    rank_bytes: tuple[int, ...]
    interrupted: bool = False
    lost: tuple[str, ...] = ()

    @property
    def new_tokens_per_s(self) -> float | None:
        """Throughput of the run."""
        return self.num_new_tokens / self.wall_s if self.num_new_tokens and self.wall_s > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON."""
        return {**dataclasses.asdict(self), "new_tokens_per_s": self.new_tokens_per_s}

    def rows(self) -> str:
        """The line that says what became of the rows."""
        missing = f", {self.num_missing} not reached (interrupted)" if self.interrupted else ""
        earlier = f"; {self.num_earlier} of them by an earlier run" if self.num_earlier else ""
        return f"rows: {self.num_ok} ok, {self.num_failed} failed{missing}{earlier}"

    def __str__(self) -> str:
        lines = [
            self.rows(),
            f"tokens: {self.num_prompt_tokens} prompt, {self.num_new_tokens} new in {self.wall_s:.2f} s "
            f"({_show(self.new_tokens_per_s)} new tokens/s, all rows together)",
            f"time to first token: {_show(self.median_time_to_first_token_s, 3)} s (median); "
            f"tokens/s of a row: {_show(self.median_tokens_per_s)} (median)",
            f"keep ratio: {_show(self.mean_keep_ratio, 4)} achieved (mean); "
            f"bytes: {self.held_bytes / 2**20:.2f} MiB held of {self.full_bytes / 2**20:.2f} MiB full",
        ]  # fmt: skip
        if len(self.rank_bytes) > 1:
            low, high = min(self.rank_bytes) / 2**20, max(self.rank_bytes) / 2**20
            lines.append(f"largest batch: {low:.2f} to {high:.2f} MiB of cache on each of {len(self.rank_bytes)} ranks")
        return "\n".join(lines)


def summarise(
    records: Sequence[Record],
    num_rows: int,
    wall_s: float,
    *,
    times: Sequence[Times],
    rank_bytes: Sequence[int],
    earlier: Collection[int] = (),
    interrupted: bool = False,
    lost: Sequence[str] = (),
) -> Summary:
    """The summary of the records of a run over `num_rows` rows.

    Args:
        times: of the rows that this run has finished, in any order.
        earlier: indices of rows that an earlier run had.
    """
    good = [record for record in records if record["error"] is None]
    own = [record for record in good if record["index"] not in earlier]
    firsts, speeds = [first for first, _ in times], [speed for _, speed in times if speed is not None]
    return Summary(
        num_ok=len(good),
        num_failed=len(records) - len(good),
        num_missing=num_rows - len(records),
        num_earlier=sum(record["index"] in earlier for record in records),
        num_prompt_tokens=sum(record["num_prompt_tokens"] for record in own),
        num_new_tokens=sum(record["num_new_tokens"] for record in own),
        wall_s=wall_s,
        median_time_to_first_token_s=median(firsts) if firsts else None,
        median_tokens_per_s=median(speeds) if speeds else None,
        mean_keep_ratio=fmean(record["achieved_keep_ratio"] for record in good) if good else None,
        held_bytes=sum(record["held_bytes"] for record in good),
        full_bytes=sum(record["full_bytes"] for record in good),
        rank_bytes=tuple(rank_bytes),
        interrupted=interrupted,
        lost=tuple(lost),
    )


def _show(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
