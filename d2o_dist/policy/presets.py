"""The named presets of `D2OConfig`, each spelled out: a better default changes no other preset."""

from __future__ import annotations

import math
from typing import Any

from d2o_dist.policy.budget import Dispersion, Pyramid, Ranked, Uniform
from d2o_dist.policy.gate import Quantile, RowThreshold, Threshold
from d2o_dist.policy.merge import Average, Drop, Mass, Released
from d2o_dist.policy.score import Accumulated, Newest, Reach, Reread, Window
from d2o_dist.policy.targets import Kept, Tail

_INTO_TAIL = Mass(max_log_mass=3.0, gate=Quantile(drop=0.25), targets=Tail(fraction=0.1, most_while_decoding=16))
_LEAN = {
    "recent_fraction": 0.2,
    "score": Reach(reach=20.0),
    "budget": Uniform(),
    "merge": _INTO_TAIL,
    "eviction_interval": 16,
}
# The common frame of the baselines: equal layers, nothing merged, evictions every 16 tokens.
_BASELINE = {"recent_fraction": 0.25, "budget": Uniform(), "merge": Drop(), "eviction_interval": 16}

PRESETS: dict[str, dict[str, Any]] = {
    "d2o": {**_LEAN, "budget": Dispersion(statistic="log_zscore", sign=1, temperature=3.3, min_layers=12)},
    "lean": _LEAN,
    "reread": {
        **_LEAN,
        "score": Reread(chunk=2048),
        "budget": Ranked(per_head=True, min_layer_tokens=16),
        "merge": Mass(max_log_mass=3.0, gate=Quantile(drop=0.25), targets=Tail(fraction=0.1, most_while_decoding=None)),
    },
    "paper": {
        "recent_fraction": 0.25,
        "score": Accumulated(),
        "budget": Dispersion(statistic="raw", sign=-1, temperature=1.0, min_layers=0, min_layer_tokens=32),
        "merge": Average(
            keys=True, self_weight=math.e, gate=Threshold(ema_beta=0.7, aggregate="max"), targets=Kept()
        ),
        "eviction_interval": 1,
    },
    "released": {
        "recent_fraction": 0.5,
        "score": Accumulated(),
        "budget": Dispersion(
            statistic="heads_minmax", sign=-1, temperature=1.0, min_layers=0, exact_total=False,
            protected_layers=(0, 1, -1), min_layer_tokens=32,
        ),
        "merge": Released(gate=RowThreshold(ema_beta=0.5, aggregate="mean")),
        "eviction_interval": 1,
    },
    "full": {**_BASELINE, "score": Newest(), "keep_ratio": 1.0, "eviction_interval": None},
    "streaming": {**_BASELINE, "score": Newest()},
    "h2o": {**_BASELINE, "score": Accumulated(), "recent_fraction": 0.5},
    "snapkv": {**_BASELINE, "score": Window(pool=7, pool_side="both")},
    "pyramidkv": {**_BASELINE, "score": Window(pool=7, pool_side="both"), "budget": Pyramid(beta=20.0)},
}  # fmt: skip
