"""What was sent: calls and bytes of every collective, by phase, axis and kind.

Bytes are the payload that one rank sends under the algorithm usual for the kind, n ranks, rounded down:

    all_reduce       2 (n - 1) / n x tensor      reduce-scatter, then all-gather
    all_gather       (n - 1) / n x output        = (n - 1) x this rank's part; padding to the longest part is counted
    reduce_scatter   (n - 1) / n x input         padding counted too
    all_to_all       what this rank has for the others
    broadcast        (n - 1) / n x tensor        the mean over ranks, so that all ranks' counters agree
    ring_shift       what this rank hands on
    barrier          0

An axis of size 1 sends nothing and counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

NO_PHASE = "other"


@dataclass(frozen=True)
class Traffic:
    """Number of collective calls and the bytes that this rank sent in them."""

    calls: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.calls + other.calls, self.bytes + other.bytes)


class _Phase:
    """A context that is on a list while it lasts. Not a generator: every layer of a step opens one."""

    def __init__(self, phases: list[str], name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._phases.append(self._name)

    def __exit__(self, *_: object) -> None:
        self._phases.pop()


class TrafficCounter:
    """Adds up traffic. One object is shared by the `Collectives` of all axes; not thread-safe.

        with counter.phase("prefill"):
            ...
        counter.total(phase="prefill", kind="all_gather").bytes
    """

    def __init__(self):
        self._found: dict[tuple[str, str, str], Traffic] = {}
        self._phases: list[str] = []

    def phase(self, name: str) -> _Phase:
        """Count what happens inside under `name`; nested phases: the innermost counts."""
        return _Phase(self._phases, name)

    def add(self, axis: str, kind: str, num_bytes: int) -> None:
        """One call."""
        key = (self._phases[-1] if self._phases else NO_PHASE, axis, kind)
        self._found[key] = self._found.get(key, Traffic()) + Traffic(1, num_bytes)

    def total(self, *, phase: str | None = None, axis: str | None = None, kind: str | None = None) -> Traffic:
        """Sum over all that matches; None matches everything."""
        wanted = (phase, axis, kind)
        found = Traffic()
        for key, traffic in self._found.items():
            if all(want is None or want == have for want, have in zip(wanted, key, strict=True)):
                found += traffic
        return found

    def to_dict(self) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
        """{phase: {axis: {kind: {"calls": int, "bytes": int}}}}, in order of first use."""
        out: dict = {}
        for (phase, axis, kind), traffic in self._found.items():
            entry = {"calls": traffic.calls, "bytes": traffic.bytes}
            out.setdefault(phase, {}).setdefault(axis, {})[kind] = entry
        return out

    def table(self) -> str:
        """A line for each phase, axis and kind, for people."""
        rows = [("phase", "axis", "kind", "calls", "bytes")]
        rows += [(*key, str(traffic.calls), str(traffic.bytes)) for key, traffic in self._found.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column > 2 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )

    def reset(self) -> None:
        """Forget the counts; open phases stay open."""
        self._found.clear()
