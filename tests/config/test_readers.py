"""Fields that no rule would read are refused where someone sets them, and only there."""

from __future__ import annotations

import dataclasses

import pytest

from d2o_dist.config.infer import InferConfig
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.presets import PRESETS

UNREAD = {
    ("d2o", "selection_pool"): (7, "selection_reach is null, and selection_reach is 20.0: set selection_reach=null"),
    ("d2o", "selection_pool_side"): ("both", "selection_reach is null"),
    ("lean", "selection_pool"): (15, "selection_reach is null"),
    ("paper", "selection_reach"): (20.0, "selection is window or mixed, and selection is cumulative"),
    ("h2o", "selection_pool"): (7, "selection is window or mixed"),
    ("lean", "temperature"): (1.0, "allocation is dynamic, and allocation is uniform"),
    ("d2o", "pyramid_beta"): (10.0, "allocation is pyramid"),
    ("d2o", "score_query_stride"): (4, "score_queries is strided"),
    ("d2o", "score_near_distance"): (0, "score_queries is strided"),
    ("d2o", "self_weight"): (1.0, "merge is keys_values or values, and merge is mass"),
    ("paper", "max_log_mass"): (1.0, "merge is mass"),
    ("paper", "tail_fraction"): (0.2, "merge_targets is tail"),
    ("paper", "max_decode_tail"): (8, "merge_targets is tail"),
    ("paper", "drop_quantile"): (0.5, "gate is quantile"),
    ("d2o", "ema_beta"): (0.5, "gate is threshold"),
    ("mass", "threshold_agg"): ("mean", "gate is threshold"),
}


@pytest.mark.parametrize(("preset", "field"), UNREAD)
def test_an_override_that_no_rule_reads_is_refused(preset, field):
    value, why = UNREAD[preset, field]
    for make in (
        lambda: D2OConfig.preset(preset, **{field: value}),
        lambda: D2OConfig.from_dict({"preset": preset, field: value}),
        lambda: D2OConfig.preset(preset).replace(**{field: value}),
    ):
        with pytest.raises(ValueError, match="is read only where") as error:
            make()
        assert f"{field} ({value})" in str(error.value) and why in str(error.value)


@pytest.mark.parametrize(("preset", "field"), [key for key in UNREAD if key[0] == "d2o"])
def test_so_it_is_on_the_defaults(preset, field):
    value, why = UNREAD[preset, field]
    for make in (lambda: D2OConfig(**{field: value}), lambda: D2OConfig.from_dict({field: value})):
        with pytest.raises(ValueError, match="is read only where") as error:
            make()
        assert why in str(error.value)


def test_a_pool_and_a_reach_are_two_ways_to_pool():
    with pytest.raises(ValueError, match=r"selection_pool \(7\) is read only where selection_reach is null"):
        D2OConfig(selection_pool=7, selection_reach=9.0)
    window = D2OConfig.preset("d2o", selection_pool=7, selection_reach=None)
    assert (window.selection_pool, window.selection_pool_side, window.selection_reach) == (7, "after", None)
    # A reach takes the place of a preset's pool, as a pool does not take the place of its reach.
    assert D2OConfig.preset("mass", selection_reach=9.0) == D2OConfig.preset("mass").replace(selection_reach=9.0)
    assert D2OConfig.preset("mass", selection_reach=9.0).selection_reach == 9.0


def test_where_another_rule_is_chosen_its_fields_may_be_set():
    assert D2OConfig(score_queries="strided", score_query_stride=4).query_sample.stride == 4
    assert D2OConfig.preset("d2o", gate="threshold", ema_beta=0.5).ema_beta == 0.5
    assert D2OConfig.preset("released", merge="mass", gate="quantile").gate == "quantile"
    assert D2OConfig(score_queries="strided", score_query_stride=4).replace(score_queries="all").query_sample is None
    assert D2OConfig.preset("paper", selection_reach=None, max_decode_tail=None) == D2OConfig.preset("paper")


def test_what_keeps_everything_reads_nothing():
    assert D2OConfig.preset("full", tail_fraction=0.3).keeps_everything


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"selection": "window", "selection_reach": 7.5}, {"allocation": "uniform"}])
def test_resolved_configurations_come_back(name, changes, tmp_path):
    changes = {} if name == "reread" and "allocation" not in changes else changes
    config = D2OConfig.preset(name, **changes)
    config.to_yaml(tmp_path / "d2o.yaml")
    assert D2OConfig.from_yaml(tmp_path / "d2o.yaml") == config == config.replace()


def test_a_preset_beside_every_field_is_refused(tmp_path):
    resolved = InferConfig(model="m")
    assert InferConfig.from_dict(resolved.to_dict()) == resolved
    values = resolved.to_dict()
    values["d2o"]["preset"] = "snapkv"
    with pytest.raises(ValueError, match='preset "snapkv" would change nothing: every field is given'):
        InferConfig.from_dict(values)
    assert len(values["d2o"]) == 1 + len(dataclasses.fields(D2OConfig))
