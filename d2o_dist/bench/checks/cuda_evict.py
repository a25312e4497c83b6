"""Checks of the eviction in CUDA C++, against `core` step by step over successive evictions, and itself run again."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2o_dist.bench.checks.common import OUT_LIMITS, STATISTICS_LIMIT, Check, Result, in_each_dtype, normal, poisoned
from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.compress import compress_layer
from d2o_dist.core.types import D2OState, LayerBudget, Slots
from d2o_dist.kernels.nearest_kept import naive_nearest_kept

_NAMES = ("keys", "values", "positions", "scores", "rates", "log_mass")


@dataclass(frozen=True)
class Case:
    """held, heavy, recent: of each row; a row of heavy 0 is not due. ties: few different ranks; same: all keys are one
    key; turned: buffers whose slots lie apart."""

    held: tuple[int, ...] = (60,)
    heavy: tuple[int, ...] = (33,)
    recent: tuple[int, ...] = (11,)
    heads: int = 2
    head_dim: int = 64
    rule: dict = field(default_factory=dict)
    ties: bool = False
    same: bool = False
    turned: bool = False
    parts: tuple[int | None, ...] = (None, 1, 5)
    evictions: int = 3


CASES = {
    "one_victim": Case((9,), (6,), (2,), heads=1),
    "all_of_a_part": Case((30,), (4,), (3,), parts=(9, 30)),
    "many_windows": Case((700,), (500,), (183,), head_dim=16, parts=(None, 2), evictions=2),
    "many_victims": Case((330,), (30,), (20,), head_dim=16, parts=(None, 7), evictions=1),
    "ragged": Case((40, 9, 57, 3), (20, 0, 33, 0), (5, 0, 8, 0), heads=3),
    "ties": Case((90,), (40,), (12,), ties=True),
    # One head and a gate by rank: by a mean of equal numbers, its last bit would decide.
    "same_keys": Case((200,), (110,), (70,), heads=1, head_dim=16, rule={"gate": "quantile"}, same=True, evictions=1),
    "turned": Case((40, 33), (20, 18), (5, 4), turned=True),
    "sinks_only": Case((40,), (3,), (2,), rule={"num_sink_tokens": 8}),
    "nothing_recent": Case((40,), (24,), (0,)),
    "nothing_kept": Case((20, 30), (0, 10), (1, 5), rule={"num_sink_tokens": 0}),
    "dim80": Case(head_dim=80),
    "dim96": Case(head_dim=96),
    "dim128": Case(head_dim=128, heads=8),
    "dim256": Case(head_dim=256),
    "dim8": Case(head_dim=8),
    "values": Case(rule={"merge": "values", "threshold_agg": "mean"}),
    "none": Case((40, 33), (20, 18), (5, 4), rule={"merge": "none"}),
    "released": Case(rule={"merge": "released", "ema_beta": 0.5, "threshold_agg": "mean"}, heads=4),
    # Its gate compares a mean with a mean of the same numbers.
    "released_one": Case((12, 30), (4, 12), (7, 17), rule={"merge": "released", "threshold_agg": "mean"}, heads=3),
    "mass": Case(rule={"merge": "mass", "selection": "window"}),
    "mass_tail": Case(
        (90, 70), (50, 45), (20, 9), rule=dict(merge="mass", selection="window", merge_targets="tail", gate="quantile")
    ),  # fmt: skip
    # Tails of 18 and 10 slots, of which 12 and 10 may be targets.
    "bounded_tail": Case(
        (90, 70), (50, 45), (20, 9), ties=True,
        rule=dict(merge="mass", selection="window", merge_targets="tail", tail_fraction=0.26, max_decode_tail=12),
    ),
    "tail_ties": Case((90,), (50,), (20,), rule=dict(merge_targets="tail", tail_fraction=0.4), ties=True),
    "quantile": Case(rule={"gate": "quantile", "drop_quantile": 0.4}, heads=5),
    "quantile_zero": Case(rule={"gate": "quantile", "drop_quantile": 0.0}),
    "mixed": Case(rule={"merge": "mass", "selection": "mixed"}),
    "recent": Case(rule={"selection": "recent"}),
    "capped_mass": Case(rule={"merge": "mass", "selection": "window", "max_log_mass": 0.2}),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("cuda_evict", CASES, run)


def run(case: Case, dtype: torch.dtype, device: str) -> Result:
    return run_rules(D2OConfig.preset("paper_minmax", **{"num_sink_tokens": 2, **case.rule}), case, dtype, device)


def run_rules(config: D2OConfig, case: Case, dtype: torch.dtype, device: str) -> Result:
    """The case, by the rules of a whole configuration rather than its own."""
    from d2o_dist.kernels.cuda.evict import EvictionRows, cuda_evict

    buffers, state = buffers_of(case, dtype, device), D2OState()
    held = list(case.held)
    heavy = [x or (0 if y else n) for x, y, n in zip(case.heavy, case.recent, held, strict=True)]
    result = Result()
    for number in range(case.evictions):
        seen = [int(row.max()) + 1 for row in buffers.positions]
        rows = EvictionRows(held, heavy, case.recent, seen)
        found = []
        for parts in case.parts:
            mine = buffers.map(torch.clone if not case.turned else _turned_clone)
            with poisoned():
                found.append((mine, cuda_evict(mine, rows, state, config, num_parts=parts)))
        want, want_state = _oracle(buffers, rows, state, config)
        kept = [max(0, n - max(0, n - x - y)) for n, x, y in zip(held, heavy, case.recent, strict=True)]
        for (mine, after), parts in zip(found, case.parts, strict=True):
            label = f"eviction {number}, {parts} parts: "
            _compare(result, label, mine, after, want, want_state, kept, dtype)
            for name in _NAMES:  # the same bits, however the heads were cut
                _same_bits(result, f"{label}{name} again", getattr(mine, name), getattr(found[0][0], name))
        buffers, state = found[0]
        # The room is filled with new tokens, so that as much is due again.
        buffers = _refilled(buffers, kept, held, seen, seed=100 * number + 7, same=case.same)
    return result


def buffers_of(case: Case, dtype: torch.dtype, device: str) -> Slots:
    """Rows in order of position, with gaps, room behind them, a key of norm 0, and similar keys, so that gates open."""
    capacity, shape = max(case.held) + 3, (len(case.held), case.heads, max(case.held) + 3)
    common = normal(len(case.held), case.heads, 1, case.head_dim, dtype=torch.float32, device="cpu", seed=9)
    keys, values = (normal(*shape, case.head_dim, dtype=torch.float32, device="cpu", seed=s) for s in (0, 1))
    keys = keys + common
    keys[:, 0, 3] = 0
    if case.same:
        keys = common.expand_as(keys).contiguous()
    generator = torch.Generator().manual_seed(3)
    gaps = torch.randint(1, 3, shape, generator=generator)
    gaps[:, :, :3] = 1
    unused = torch.arange(capacity) >= torch.tensor(case.held)[:, None, None]
    positions = (gaps.cumsum(-1) - 1).masked_fill(unused, -1)
    statistics = torch.rand(3, *shape, generator=generator) + 1e-3
    if case.ties:
        statistics = (statistics * 3).round() / 3 + 0.1
    slots = Slots(keys.to(dtype), values.to(dtype), positions, *statistics.unbind(0)).map(lambda x: x.to(device))
    return slots.map(_turned_clone) if case.turned else slots


def _turned_clone(x: Tensor) -> Tensor:
    """[B, H, C, D] whose heads of one slot lie together, as a model makes them; the rest as it is."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2) if x.dim() == 4 else x.clone()


def _oracle(buffers: Slots, rows, state: D2OState, config: D2OConfig) -> tuple[Slots, D2OState]:
    """What `core` makes of the same bits on a CPU, in float32, with the naive search (which breaks no tie wrongly)."""
    wide = buffers.map(lambda x: x.cpu())
    wide = wide.replace(keys=wide.keys.float(), values=wide.values.float())
    budget = LayerBudget(torch.tensor(list(rows.heavy)), torch.tensor(list(rows.recent)))
    return compress_layer(
        wide, budget, state.map(lambda x: x.cpu()), config, finalize=False,
        num_seen_tokens=torch.tensor(list(rows.seen)), nearest=naive_nearest_kept,
    )  # fmt: skip


def _compare(
    result: Result, label: str, mine: Slots, after: D2OState, want: Slots, want_state: D2OState, kept: list[int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    capacity = mine.positions.shape[-1]
    expected = torch.full_like(mine.positions, -1, device="cpu")
    expected[:, :, : want.positions.shape[-1]] = want.positions
    result.equal(label + "positions", mine.positions, expected)
    live = torch.arange(capacity) < torch.tensor(kept)[:, None, None]
    live = live.expand(mine.positions.shape)
    for name in ("keys", "values", "scores", "rates", "log_mass"):
        got, wanted = getattr(mine, name).cpu(), getattr(want, name)
        limit = OUT_LIMITS[dtype] if name in ("keys", "values") else STATISTICS_LIMIT
        for row, count in enumerate(kept):
            if count:
                result.near(f"{label}{name} of row {row}", got[row, :, :count], wanted[row, :, :count], limit)
    result.equal(label + "live", mine.positions >= 0, live)
    for name in ("num_merged", "num_dropped"):
        result.equal(label + name, getattr(after, name), getattr(want_state, name))
    if want_state.threshold is None:
        result.equal(label + "no threshold", torch.tensor(after.threshold is None), torch.tensor(True))
        return
    absent = want_state.threshold.isnan()
    result.equal(label + "rows without threshold", after.threshold.isnan(), absent)
    known = (x.cpu().masked_fill(absent, 0) for x in (after.threshold, want_state.threshold))
    result.near(label + "threshold", *known, STATISTICS_LIMIT)


def _same_bits(result: Result, name: str, one: Tensor, two: Tensor) -> None:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    result.equal(name, one.contiguous().view(kind), two.contiguous().view(kind))


def _refilled(buffers: Slots, kept: list[int], held: list[int], seen: list[int], *, seed: int, same: bool) -> Slots:
    for row, (begin, end) in enumerate(zip(kept, held, strict=True)):
        here = (row, slice(None), slice(begin, end))
        shape = buffers.keys[here].shape
        if not same:
            old = buffers.keys[row, :, begin - 1 : begin] if begin else 0
            buffers.keys[here] = old + normal(*shape, dtype=buffers.keys.dtype, device=buffers.keys.device, seed=seed)
        buffers.positions[here] = torch.arange(seen[row], seen[row] + end - begin, device=buffers.keys.device)
        for number, name in enumerate(("scores", "rates")):
            fresh = normal(*shape[:2], dtype=torch.float32, device=buffers.keys.device, seed=seed + number)
            getattr(buffers, name)[here] = fresh.abs()
    return buffers
