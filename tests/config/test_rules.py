"""Rules as they are given: by name, by fields, over a preset; and what is refused, with the nearest known word."""

from __future__ import annotations

import dataclasses

import pytest

from d2o_dist.config.infer import InferConfig
from d2o_dist.fields.overrides import apply_overrides, parse_override
from d2o_dist.policy import PRESETS, D2OConfig
from d2o_dist.policy.budget import BUDGETS, Dispersion, Uniform
from d2o_dist.policy.gate import GATES, Quantile, Threshold
from d2o_dist.policy.merge import MERGES, Average, Mass, Released
from d2o_dist.policy.score import SCORES, Reach, Window
from d2o_dist.policy.targets import TARGETS, Kept, Tail

REFUSED = [
    ({"score": {"reech": 3.0}}, r'score \(reach\) has no field "reech". Did you mean "reach"\?'),
    ({"score": {"pool": 7}}, r"score.pool is a field of window, but score.rule is reach: set score.rule=window"),
    ({"score": "windw"}, r"score.rule \('windw'\) must be one of reach, window.*Did you mean \"window\"\?"),
    ({"score": 3}, r"score \(3\) must be the name of a rule, or a mapping"),
    ({"score": Uniform()}, r"score \(Uniform.*must be one of the rules reach, window"),
    ({"score": {"rule": "window", "pool": 4}}, r"score.pool \(4\) must be odd and at least 1"),
    ({"score": {"reach": 0}}, r"score.reach \(0\) must be above 0"),
    ({"score": {"reach": float("nan")}}, r"score.reach \(nan\) must be a finite number"),
    ({"score": {"reach": 10**400}}, r"score.reach \(100+\.\.\.0+\) must be a finite number"),
    ({"score": {"add_accumulated": 1}}, r"score.add_accumulated \(1\) must be true or false"),
    ({"budget": {"beta": 3.0}}, r"budget.beta is a field of pyramid, but budget.rule is dispersion"),
    ({"budget": {"sign": 2}}, r"budget.sign \(2\) must be one of -1, 1"),
    ({"budget": {"min_layers": -1}}, r"budget.min_layers \(-1\) must be at least 0"),
    ({"budget": {"min_layers": 2.5}}, r"budget.min_layers \(2.5\) must be an integer"),
    ({"budget": {"statistic": "rw"}}, r"budget.statistic \('rw'\) must be one of .*Did you mean \"raw\"\?"),
    ({"budget": {"min_layer_ratio": 1.5}}, r"budget.min_layer_ratio \(1.5\) must be in \[0, 1\]"),
    ({"budget": {"protected_layers": "0"}}, r"budget.protected_layers \('0'\) must be a list of layer indices"),
    ({"budget": {"protected_layers": [10**400]}}, r"budget.protected_layers has 1000.*; it must be at most 92233"),
    ({"budget": {"protected_layers": [0.5]}}, r"budget.protected_layers has 0.5; layer indices are integers"),
    ({"budget": {"rule": "pyramid", "per_head": True}}, r"budget.per_head \(True\) must be false"),
    ({"budget": {"min_layer_ratio": 0.5}, "keep_ratio": 0.2}, r"budget.min_layer_ratio \(0.5\) alone exceeds"),
    ({"budget": "ranked", "score": "newest"}, r"budget.rule \(ranked\) compares .* score.rule \(newest\) reads none"),
    ({"merge": {"gate": {"ema_beta": 0.5}}}, r"merge.gate.ema_beta is a field of threshold, but merge.gate"),
    ({"merge": {"gate": {"drop": 1.0}}}, r"merge.gate.drop \(1.0\) must be in \[0, 1\)"),
    ({"merge": {"targets": {"rule": "kept", "fraction": 0.1}}}, r"merge.targets.fraction is a field of tail"),
    ({"merge": {"self_weight": 1.0}}, r"merge.self_weight is a field of average, but merge.rule is mass"),
    ({"merge": {"rule": "released", "gate": "quantile"}}, r"merge.gate.rule \('quantile'\) must be one of row"),
    ({"statistics": {"query_stride": 0}}, r"statistics.query_stride \(0\) must be at least 1"),
    ({"statistics": {"near_distance": 3}}, r"near_distance \(3\) is read only where statistics.query"),
    ({"statistics": {"window": 3}}, r'statistics has no field "window"'),
    ({"recent_fraction": 1.0}, r"recent_fraction \(1.0\) must be in \(0, 1\)"),
    ({"keep_ratio": 0}, r"keep_ratio \(0\) must be in \(0, 1\]"),
    ({"keep_ratio": 0.5, "keep_tokens": 9}, r"keep_ratio \(0.5\) and keep_tokens \(9\) are two ways to say one thing"),
    ({"keep_tokens": 3, "budget": {"min_layer_tokens": 0}}, r"keep_tokens \(3\) gives a layer 2 heavy and 1 recent"),
    ({"eviction_interval": 0}, r"eviction_interval \(0\) must be at least 1, or null"),
    ({"reach": 3.0}, r'D2OConfig has no field "reach". Did you mean "score.reach"\?'),
    ({"temperature": 3.0}, r'D2OConfig has no field "temperature". Did you mean "budget.temperature"\?'),
    ({"keep_ration": 0.5}, r'D2OConfig has no field "keep_ration". Did you mean "keep_ratio"\?'),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields)[:60] for fields, _ in REFUSED])
def test_what_is_refused(fields, message):
    for make in (
        lambda: D2OConfig.from_dict(fields),
        lambda: D2OConfig.from_dict({"preset": "d2o", **fields}),
        lambda: D2OConfig.preset("d2o", **fields),
        lambda: D2OConfig().replace(**{"keep_ratio": None, **fields} if "keep_tokens" in fields else fields),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_mapping_changes_fields_of_the_rule_that_is_there():
    assert D2OConfig(score={"reach": 7.5}).score == Reach(reach=7.5)
    assert D2OConfig.preset("snapkv", score={"pool": 9}).score == Window(pool=9)
    assert D2OConfig().replace(merge={"gate": {"drop": 0.5}}).merge == Mass(gate=Quantile(drop=0.5))
    assert D2OConfig(merge=Mass(targets={"fraction": 0.3})).merge.targets == Tail(fraction=0.3)


def test_another_rule_keeps_the_fields_of_the_same_name():
    paper = D2OConfig.preset("paper", budget={"per_head": True})
    uniform = paper.replace(budget="uniform")
    assert uniform.budget == Uniform(per_head=True, min_layer_tokens=paper.budget.min_layer_tokens)
    merged = D2OConfig().replace(merge="average").merge
    assert merged == Average(gate=Quantile(), targets=Tail())
    assert D2OConfig(merge="released").merge == Released()
    assert D2OConfig(merge={"targets": "kept", "gate": "threshold"}).merge == Mass(gate=Threshold(), targets=Kept())
    assert D2OConfig(budget={"rule": "dispersion", "sign": -1}).budget == dataclasses.replace(Dispersion(), sign=-1)


def test_flags_reach_every_field():
    flags = ["d2o.score.reach=10", "d2o.merge.gate.rule=threshold", "d2o.merge.gate.ema_beta=0.5", "model=m"]
    config = InferConfig.from_dict(apply_overrides({"d2o": {"preset": "lean"}}, map(parse_override, flags)))
    assert config.d2o.score == Reach(reach=10) and config.d2o.merge.gate == Threshold(ema_beta=0.5)
    assert config.d2o.budget == D2OConfig.preset("lean").budget


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"score": {"rule": "window", "pool": 9}}, {"budget": "uniform"}])
def test_resolved_configurations_come_back(name, changes, tmp_path):
    changes = {} if name == "reread" and "budget" not in changes else changes
    config = D2OConfig.preset(name, **changes)
    config.to_yaml(tmp_path / "d2o.yaml")
    assert D2OConfig.from_yaml(tmp_path / "d2o.yaml") == config == config.replace()


def test_a_preset_beside_every_field_is_refused():
    resolved = InferConfig(model="m")
    assert InferConfig.from_dict(resolved.to_dict()) == resolved
    values = resolved.to_dict()
    values["d2o"]["preset"] = "snapkv"
    with pytest.raises(ValueError, match='preset "snapkv" would change nothing: every field is given'):
        InferConfig.from_dict(values)


def test_rules_are_known_by_their_names_and_checked_wherever_they_are_made():
    for rules in (SCORES, BUDGETS, MERGES, GATES, TARGETS):
        assert all(rule.name == name and rule().to_dict()["rule"] == name for name, rule in rules.items())
    with pytest.raises(ValueError, match=r"score.reach \(-1\) must be above 0"):
        Reach(reach=-1)
