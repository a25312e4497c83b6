"""The library's configuration from the names of the specification, which are flat and which the oracle speaks too.

    spec("mass", keep_ratio=0.3, selection="mixed", gate="threshold")

Presets here are those of the specification and some that measured well before the default did; the package has fewer.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from d2o_dist.policy import D2OConfig
from d2o_dist.policy.budget import Dispersion, Profile, Pyramid, Ranked, Uniform
from d2o_dist.policy.gate import Quantile, RowThreshold, Threshold
from d2o_dist.policy.merge import Average, Drop, Mass, Released
from d2o_dist.policy.score import Accumulated, Joint, Newest, Reach, Reread, Window
from d2o_dist.policy.statistics import StatisticsConfig
from d2o_dist.policy.targets import Kept, Tail
from tests.oracle import naive_d2o
from tests.oracle.naive_d2o import OracleConfig

DEFAULTS: dict[str, Any] = {
    "keep_ratio": None,
    "keep_tokens": None,
    "allocation": "dynamic",
    "profile": None,
    "budget_per": "layer",
    "dispersion": "log_zscore",
    "dispersion_sign": 1,
    "temperature": 3.3,
    "min_layers": 0,  # tiny models have few; the default of the package has more
    "pyramid_beta": 20.0,
    "exact_total": True,
    "min_layer_ratio": 0.01,
    "min_layer_tokens": 256,
    "protected_layers": (),
    "heavy_fraction": 0.8,
    "num_sink_tokens": 4,
    "selection": "window",
    "selection_pool": 15,
    "selection_pool_side": "after",
    "selection_reach": 20.0,
    "joint_share": 0.5,
    "rate_window": 32,
    "reread_chunk": 2048,
    "score_queries": "auto",  # all | strided | auto: strided by 32, near 16, where only shares of layers need sums
    "score_query_stride": 8,
    "score_near_distance": 64,
    "merge": "mass",
    "merge_targets": "tail",
    "tail_fraction": 0.1,
    "max_decode_tail": 16,
    "gate": "quantile",
    "drop_quantile": 0.25,
    "ema_beta": 0.7,
    "threshold_agg": "max",
    "self_weight": math.e,
    "max_log_mass": 3.0,
    "eviction_interval": 16,
}
# What the oracle's presets leave out. Neither the paper nor its code holds short prompts above the ratio.
_PAPER_RULES = {
    "min_layer_tokens": 32,
    "dispersion": "layers_minmax",
    "dispersion_sign": -1,
    "temperature": 1.0,
    "heavy_fraction": 0.75,
    "selection": "cumulative",
    "selection_pool": 7,
    "selection_pool_side": "both",
    "selection_reach": None,
    "merge": "keys_values",
    "merge_targets": "kept",
    "max_decode_tail": None,
    "gate": "threshold",
}
PRESETS: dict[str, dict[str, Any]] = {name: {**_PAPER_RULES, **fields} for name, fields in naive_d2o.PRESETS.items()}
_SPAN = {**PRESETS["mass"], "selection_pool": 15, "selection_pool_side": "after"}
_REACH = {**_SPAN, "selection_reach": 20.0, "max_decode_tail": 16}
PRESETS |= {
    "d2o": {},
    "span": _SPAN,
    "reach": _REACH,
    "lean": {**_REACH, "allocation": "uniform"},
    "reread": {
        **_PAPER_RULES,
        "allocation": "ranked",
        "budget_per": "head",
        "selection": "reread",
        "heavy_fraction": 0.8,
        "min_layer_tokens": 16,
        "merge": "mass",
        "merge_targets": "tail",
        "gate": "quantile",
    },
}


SHARES_SAMPLE = {"score_queries": "strided", "score_query_stride": 32, "score_near_distance": 16}


def flat(preset: str = "d2o", **fields: Any) -> SimpleNamespace:
    """All fields of the specification of a preset, for loops that read them."""
    assert set(fields) <= set(DEFAULTS), set(fields) - set(DEFAULTS)
    return SimpleNamespace(**{**DEFAULTS, **PRESETS[preset], **fields})


def spec(preset: str = "d2o", **fields: Any) -> D2OConfig:
    """A preset of the specification with fields of the specification."""
    f = vars(flat(preset, **fields))
    return D2OConfig(
        keep_ratio=f["keep_ratio"],
        keep_tokens=f["keep_tokens"],
        num_sink_tokens=f["num_sink_tokens"],
        recent_fraction=round(1 - f["heavy_fraction"], 12),
        eviction_interval=f["eviction_interval"],
        score=_score(f),
        budget=_budget(f),
        merge=_merge(f),
        statistics=StatisticsConfig(
            f["rate_window"],
            *{
                "auto": (),
                "all": (1,),
                "strided": (f["score_query_stride"], *[f["score_near_distance"]] * (f["score_query_stride"] > 1)),
            }[f["score_queries"]],
        ),
    )


def pair(preset: str, **fields: Any) -> tuple[D2OConfig, OracleConfig]:
    """The same configuration for the library and for the oracle; `keep_tokens` goes before `keep_ratio`."""
    if fields.get("keep_tokens"):
        fields.pop("keep_ratio")
    values = vars(flat(preset, **fields))
    values.pop("pyramid_beta")  # the oracle knows one
    if values["score_queries"] == "auto":
        ranks = values["selection"] in ("cumulative", "average", "mixed", "joint")
        values |= {"score_queries": "all"} if ranks else SHARES_SAMPLE
    return spec(preset, **fields), OracleConfig(**values)


def _score(f: dict[str, Any]):
    if f["selection"] in ("window", "mixed"):
        mixed = f["selection"] == "mixed"
        if f["selection_reach"] is not None:
            return Reach(add_accumulated=mixed, reach=f["selection_reach"])
        return Window(add_accumulated=mixed, pool=f["selection_pool"], pool_side=f["selection_pool_side"])
    if f["selection"] == "joint":
        return Joint(reach=f["selection_reach"], accumulated_share=f["joint_share"])
    if f["selection"] in ("cumulative", "average"):
        return Accumulated(mean=f["selection"] == "average")
    return {"recent": Newest(), "reread": Reread(chunk=f["reread_chunk"])}[f["selection"]]


def _budget(f: dict[str, Any]):
    common = {name: f[name] for name in ("exact_total", "min_layer_ratio", "min_layer_tokens", "protected_layers")}
    common["per_head"] = f["budget_per"] == "head"
    if f["allocation"] == "dynamic":
        return Dispersion(
            statistic=f["dispersion"], sign=f["dispersion_sign"], temperature=f["temperature"],
            min_layers=f["min_layers"], **common,
        )  # fmt: skip
    if f["allocation"] == "pyramid":
        return Pyramid(beta=f["pyramid_beta"], **common)
    if f["allocation"] == "profile":
        return Profile(shares=f["profile"], **common)
    return {"uniform": Uniform, "ranked": Ranked}[f["allocation"]](**common)


def _merge(f: dict[str, Any]):
    if f["merge"] == "none":
        return Drop()
    if f["merge"] == "released":
        return Released(gate=RowThreshold(f["ema_beta"], f["threshold_agg"]))
    gate = Threshold(f["ema_beta"], f["threshold_agg"]) if f["gate"] == "threshold" else Quantile(f["drop_quantile"])
    targets = Kept() if f["merge_targets"] == "kept" else Tail(f["tail_fraction"], f["max_decode_tail"])
    if f["merge"] == "mass":
        return Mass(max_log_mass=f["max_log_mass"], gate=gate, targets=targets)
    return Average(keys=f["merge"] == "keys_values", self_weight=f["self_weight"], gate=gate, targets=targets)
