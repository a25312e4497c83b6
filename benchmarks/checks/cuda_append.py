"""Checks of the append in CUDA C++: what it writes, what it leaves, rows without a token."""

import torch

from benchmarks.checks.common import Check, Result, in_each_dtype, normal
from d2o_dist.slots.slots import Slots

_NAMES = ("keys", "values", "positions", "scores", "rates", "log_mass")
# name: (KV heads, head dim, slot of each row; -1 and 9: outside)
CASES = {
    "one": (1, 64, (0,)),
    "rows": (3, 80, (4, 0, 8)),
    "absent": (2, 128, (-1, 5, 9)),
    "wide": (2, 256, (8,)),
    "odd": (2, 7, (3, 3)),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("cuda_append", CASES, run)


def run(case: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, device: str) -> Result:
    from d2o_dist.kernels.cuda.append import cuda_append

    heads, head_dim, slots = case
    shape = (len(slots), heads, 9)
    keys, values = (normal(*shape, head_dim, dtype=dtype, device=device, seed=s) for s in (0, 1))
    positions = torch.full(shape, -1, device=device)
    buffers = Slots(keys, values, positions, *torch.ones(3, *shape, device=device).unbind(0))
    # As a model makes them: the heads of a token lie together.
    new = [
        normal(len(slots), 1, heads, head_dim, dtype=dtype, device=device, seed=s).transpose(1, 2)[:, :, 0]
        for s in (2, 3)
    ]
    want = buffers.map(torch.clone)
    seen = [100 + row for row in range(len(slots))]
    for row, slot in enumerate(slots):
        if 0 <= slot < 9:
            want.keys[row, :, slot], want.values[row, :, slot] = new[0][row], new[1][row]
            want.positions[row, :, slot] = seen[row]
            for statistic in (want.scores, want.rates, want.log_mass):
                statistic[row, :, slot] = 0
    cuda_append(buffers, *new, torch.tensor(slots, device=device), torch.tensor(seen, device=device))
    result = Result()
    for name in _NAMES:
        result.equal(name, getattr(buffers, name), getattr(want, name))
    return result
