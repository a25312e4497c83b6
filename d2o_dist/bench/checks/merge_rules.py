"""Checks of merging by the kernel beside `core`, under every rule that says who weighs what."""

from __future__ import annotations

import torch

from d2o_dist.bench.checks.common import OUT_LIMITS, STATISTICS_LIMIT, Check, Result, normal
from d2o_dist.compression.merge import merge_evicted
from d2o_dist.config.d2o import MERGES, D2OConfig
from d2o_dist.config.presets import PRESETS
from d2o_dist.core.merge import merge_into
from d2o_dist.core.types import Slots
from d2o_dist.kernels.backend import get_backend, set_backend

# What `core.merge` reads of a configuration: `merge`, and these beside it.
NUMBERS = {"self_weight": (0.25, 10.0), "max_log_mass": (0.0, 0.3)}


def configs() -> dict[str, D2OConfig]:
    """Every preset, and every preset with one of these fields changed, as far as a rule reads it."""
    changes = [{}, *({"merge": value} for value in MERGES)]
    changes += [{name: value} for name, values in NUMBERS.items() for value in values]
    found = {}
    for preset in PRESETS:
        for change in changes:
            try:
                found[" ".join([preset, *map(str, change.values())])] = D2OConfig.preset(preset, **change)
            except ValueError:
                continue
    return found


def checks() -> list[Check]:
    """One, of all configurations: what differs between most of them is nothing that this kernel is told."""
    return [Check("merge_rules", "all", run)]


def run(device: str) -> Result:
    """Each rule by the kernel, and by `core` on a CPU."""
    kept, evicted = _slots(7, 0, device), _slots(40, 10, device)
    generator = torch.Generator().manual_seed(3)
    similarity = torch.rand(2, 2, 40, generator=generator) * 2 - 1
    target = torch.randint(0, 5, (2, 2, 40), generator=generator)
    merged = torch.rand(2, 2, 40, generator=generator) < 0.7
    plain = (kept.map(lambda x: x.cpu()), evicted.map(lambda x: x.cpu()), similarity, target, merged)
    result, before, found = Result(), get_backend(), {}
    for name, config in configs().items():
        # The rest of a configuration is not read: one for each of those that differ.
        rule = (config.merge, config.self_weight, config.max_log_mass)
        try:
            set_backend("triton")
            got = found.get(rule) or merge_evicted(
                kept, evicted, similarity.to(device), target.to(device), merged.to(device), config
            )
        finally:
            set_backend(before)
        found[rule] = got
        want = merge_into(*plain, config)
        for field in ("keys", "values"):
            result.near(f"{name}: {field}", getattr(got, field), getattr(want, field), OUT_LIMITS[torch.float32])
        for field in ("scores", "rates", "log_mass"):
            result.near(f"{name}: {field}", getattr(got, field), getattr(want, field), STATISTICS_LIMIT)
        result.equal(f"{name}: positions", got.positions, want.positions)
    return result


def _slots(count: int, seed: int, device: str) -> Slots:
    keys, values = (normal(2, 2, count, 16, dtype=torch.float32, device=device, seed=seed + n) for n in (0, 1))
    statistics = (normal(2, 2, count, dtype=torch.float32, device=device, seed=seed + n).abs() for n in (2, 3, 4))
    return Slots(keys, values, torch.arange(count, device=device).expand(2, 2, count), *statistics)
