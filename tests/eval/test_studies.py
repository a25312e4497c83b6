"""Methods of the shipped evaluations and studies against the specification, whose flat names they are published by.

What `docs/results` shows was measured under these configurations: a new default, or another preset, changes none.
"""

from __future__ import annotations

import pytest

from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.policy.budget import Dispersion
from tests.eval.test_eval_config import CONFIGS, STUDIES
from tests.spec import DEFAULTS, flat
from tests.spec import spec as spec_of


def spec(preset, **fields):
    """As published: no layer below 32 slots, unless the preset names another number. Models that results are of have
    more layers than share equally."""
    if flat(preset).min_layer_tokens == DEFAULTS["min_layer_tokens"]:
        fields |= {"min_layer_tokens": 32, "min_layers": Dispersion().min_layers}
    return spec_of(preset, **fields)


# By file: methods that are not a preset of the specification of the same name.
WERE = {
    "configs/eval_long_needle_32k": {
        "d2o": spec("d2o", score_queries="strided"),
        "lean": spec("lean", score_queries="strided"),
        "paper_minmax": spec("paper_minmax", score_queries="strided"),
        "paper": spec("paper", score_queries="strided"),
        "released": spec("released", score_queries="strided"),
        "mass": spec("mass", score_queries="strided"),
        "h2o": spec("h2o", score_queries="strided"),
        "snapkv": spec("snapkv", score_queries="strided"),
        "pyramidkv": spec("pyramidkv", score_queries="strided"),
        "streaming": spec("streaming", score_queries="strided"),
    },
    "studies/answers": {
        "profile": spec("d2o", allocation="profile"),
        "h2o mean": spec("h2o", selection="average"),
        "joint 0.25": spec("d2o", selection="joint", joint_share=0.25),
        "joint 0.5": spec("d2o", selection="joint", joint_share=0.5),
        "joint 0.5 sampled": spec(
            "d2o", selection="joint", joint_share=0.5, allocation="profile", score_queries="strided",
            score_query_stride=32, score_near_distance=16,
        ),
    },
    "studies/combinations": {
        "heavy 0.5": spec("span", heavy_fraction=0.5),
        "temperature 6, heavy 0.5": spec("span", temperature=6.0, heavy_fraction=0.5),
        "uniform": spec("span", allocation="uniform"),
        "uniform, heavy 0.65": spec("span", allocation="uniform", heavy_fraction=0.65),
        "uniform, heavy 0.5": spec("span", allocation="uniform", heavy_fraction=0.5),
        "uniform, heavy 0.5, tail 0.2": spec("span", allocation="uniform", heavy_fraction=0.5, tail_fraction=0.2),
        "uniform, heavy 0.5, mixed": spec("span", allocation="uniform", heavy_fraction=0.5, selection="mixed"),
        "uniform, heavy 0.5, pool 31": spec("span", allocation="uniform", heavy_fraction=0.5, selection_pool=31),
        "uniform, heavy 0.5, no merge": spec("span", allocation="uniform", heavy_fraction=0.5, merge="none"),
        "uniform, heavy 0.5, threshold": spec("span", allocation="uniform", heavy_fraction=0.5, gate="threshold"),
        "heads_minmax -1, heavy 0.5": spec(
            "span", dispersion="heads_minmax", dispersion_sign=-1, temperature=1.0, heavy_fraction=0.5
        ),
    },
    "studies/decoding": {
        "interval 1": spec("span", eviction_interval=1),
        "interval 64": spec("span", eviction_interval=64),
        "never": spec("span", eviction_interval=None),
        "no merge": spec("span", merge="none"),
        "threshold gate": spec("span", gate="threshold"),
        "heavy 0.5": spec("span", heavy_fraction=0.5),
    },
    "studies/defaults": {
        "pyramid": spec("d2o", allocation="pyramid"),
        "sign -1": spec("d2o", dispersion_sign=-1),
        "layers_minmax +1": spec("d2o", dispersion="layers_minmax", temperature=1.0),
        "layers_minmax -1": spec("d2o", dispersion="layers_minmax", dispersion_sign=-1, temperature=1.0),
        "heads_minmax +1": spec("d2o", dispersion="heads_minmax", temperature=1.0),
        "heads_minmax -1": spec("d2o", dispersion="heads_minmax", dispersion_sign=-1, temperature=1.0),
        "raw -1": spec("d2o", dispersion="raw", dispersion_sign=-1, temperature=1.0),
        "temperature 1": spec("d2o", temperature=1.0),
        "temperature 2": spec("d2o", temperature=2.0),
        "temperature 6": spec("d2o", temperature=6.0),
        "protected 0": spec("d2o", protected_layers=[0]),
        "heavy 0.5": spec("d2o", heavy_fraction=0.5),
        "heavy 0.65": spec("d2o", heavy_fraction=0.65),
        "heavy 0.9": spec("d2o", heavy_fraction=0.9),
        "cumulative": spec("d2o", selection="cumulative"),
        "mixed": spec("d2o", selection="mixed"),
        "window 8": spec("d2o", rate_window=8),
        "window 16": spec("d2o", rate_window=16),
        "window 64": spec("d2o", rate_window=64),
        "reach 10": spec("d2o", selection_reach=10.0),
        "reach 40": spec("d2o", selection_reach=40.0),
        "no merge": spec("d2o", merge="none"),
        "values": spec("d2o", merge="values"),
        "keys_values": spec("d2o", merge="keys_values"),
        "mass into all kept": spec("d2o", merge_targets="kept"),
        "tail 0.05": spec("d2o", tail_fraction=0.05),
        "tail 0.2": spec("d2o", tail_fraction=0.2),
        "merge all": spec("d2o", drop_quantile=0.0),
        "drop half": spec("d2o", drop_quantile=0.5),
        "threshold gate": spec("d2o", gate="threshold"),
        "max_log_mass 1.5": spec("d2o", max_log_mass=1.5),
        "max_log_mass 6": spec("d2o", max_log_mass=6.0),
    },
    "studies/hidden": {
        "reread-drop": spec("reread", merge="none"),
        "reread-layers": spec("reread", merge="none", budget_per="layer"),
    },
    "studies/kvzip": {"drop": spec("reread", merge="none")},
    "studies/paper_rules": {
        "uniform": spec("paper_minmax", allocation="uniform"),
        "sign +1": spec("paper_minmax", dispersion_sign=1),
        "heads_minmax": spec("paper_minmax", dispersion="heads_minmax"),
        "heavy 0.5": spec("paper_minmax", heavy_fraction=0.5),
        "heavy 0.9": spec("paper_minmax", heavy_fraction=0.9),
        "no merge": spec("paper_minmax", merge="none"),
        "values": spec("paper_minmax", merge="values"),
        "mass": spec("paper_minmax", merge="mass"),
        "self weight 1": spec("paper_minmax", self_weight=1.0),
        "self weight 8": spec("paper_minmax", self_weight=8.0),
        "self weight 64": spec("paper_minmax", self_weight=64.0),
        "quantile 0.25": spec("paper_minmax", gate="quantile"),
        "quantile 0.75": spec("paper_minmax", gate="quantile", drop_quantile=0.75),
        "into the tail": spec("paper_minmax", merge_targets="tail"),
    },
    "studies/pooling": {
        "mass-pool-15": spec("mass", selection_pool=15),
        "mass-pool-31": spec("mass", selection_pool=31),
    },
    "studies/queries": {
        "paper_minmax-strided": spec("paper_minmax", score_queries="strided"),
        "paper_minmax-strided-near-0": spec("paper_minmax", score_queries="strided", score_near_distance=0),
        "h2o-strided": spec("h2o", score_queries="strided"),
        "mass-strided": spec("mass", score_queries="strided"),
    },
    "studies/spans": {
        "reach-10": spec("reach", selection_reach=10.0),
        "reach-40": spec("reach", selection_reach=40.0),
    },
    "studies/tail": {
        "no bound": spec("span", max_decode_tail=None),
        "bound 4": spec("span", max_decode_tail=4),
        "bound 8": spec("span", max_decode_tail=8),
        "bound 16": spec("span", max_decode_tail=16),
        "bound 32": spec("span", max_decode_tail=32),
    },
}


@pytest.mark.parametrize("path", [*CONFIGS, *STUDIES], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_method_is_what_was_measured(path):
    config = EvalConfig.load(path)
    were = WERE.get(f"{path.parent.name}/{path.stem}", {})
    methods = config.expand_methods()[1:]
    assert len(methods) == len(config.methods) * len(config.keep_ratios) and set(were) <= {one.name for one in methods}
    for method in methods:
        before = were[method.name] if method.name in were else spec(method.name)
        assert method.d2o == before.replace(keep_ratio=method.d2o.keep_ratio), method.label
