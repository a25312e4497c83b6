"""`TrainConfig`: round trips, and errors that name value and limit."""

import pytest
import yaml

from d2o_dist.config.distill import DistillConfig
from d2o_dist.config.train import TrainConfig
from d2o_dist.fields.io import dump_yaml
from tests.house import REPO

BASE = {"model": "m", "output": "o", "data": {"train": "t.txt"}}
D2O = {**BASE, "objective": "d2o_distill", "sequence_length": 64, "context_length": 48}


def test_round_trip_through_yaml():
    config = TrainConfig.from_dict({**D2O, "lora": {"rank": 4}, "d2o": {"preset": "lean"}, "keep_ratio": [0.1, 0.3]})
    again = TrainConfig.from_dict(yaml.safe_load(dump_yaml(config.to_dict())))
    assert again == config and again.lora.rank == 4 and again.d2o.merge.name == "mass"
    assert TrainConfig.from_dict(BASE).lora is None


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("train_*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path):
    assert TrainConfig.load(path).model


def test_overrides_take_precedence(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(D2O))
    config = TrainConfig.load(path, [("optimizer.lr", 0.5), ("lora.rank", 2)])
    assert config.optimizer.lr == 0.5 and config.lora.rank == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, 'no field "modle". Did you mean "model"'),
        ({"optimizer": {"lrr": 1}}, 'no field "lrr". Did you mean "lr"'),
        ({"model": None}, "model is missing"),
        ({"data": {}}, "data.train is missing"),
        ({"objective": "dpo"}, r"objective \('dpo'\) must be one of lm, d2o_lm, d2o_distill"),
        ({"context_length": None}, "needs context_length"),
        ({"context_length": 64}, r"context_length \(64\) must be in \[1, 63\]"),
        ({"objective": "d2o_lm", "distill": {"lm_weight": 0.5}}, 'distill is not used by objective "d2o_lm"'),
        ({"objective": "lm"}, r'context_length \(48\) is not used by objective "lm"'),
        ({"keep_ratio": [0.3, 0.2]}, r"keep_ratio \(\[0.3, 0.2\]\) must be \[low, high\]"),
        ({"keep_ratio": [0.0, 0.2]}, r"keep_ratio has 0.0, which must be in \(0, 1\]"),
        ({"keep_ratio": 0.2}, r"keep_ratio \(0.2\) must be a list"),
        ({"eval_ratios": [0.005]}, r"min_layer_ratio \(0.01\) alone exceeds the total: keep_ratio is 0.005"),
        ({"eval_ratios": [], "eval_every": 5, "data": {"train": "t", "validation": "v"}},
         "eval_ratios is empty, but eval_every is 5"),
        ({"eval_every": 5}, r"eval_every \(5\) has nothing to measure: data.validation is null"),
        ({"d2o": {"preset": "reread"}}, "training compresses by layer, after one reading: d2o has score.rule reread"),
        ({"d2o": {"budget": {"per_head": True}}}, "budget.per_head True; score.rule reread"),
        ({"global_batch_size": 6, "micro_batch_size": 4}, r"global_batch_size \(6\) must be a multiple of .*\(4\)"),
        ({"timeout": 0}, r"timeout \(0\) must be in \[1, 1000000\] seconds"),
        ({"sp": 5}, r"sequence_length \(64\) must be divisible by sp \(5\)"),
        ({"sp": 32}, r"context_length \(48\) must be divisible by sp \(32\)"),
        ({"engine": {"zero_stage": 2}}, r'zero_stage \(2\).* need engine.name "deepspeed"'),
        ({"engine": {"name": "deepspeed", "zero_stage": 4}}, r"zero_stage \(4\) must be in \[0, 3\]"),
        ({"engine": {"name": "deepspeed", "zero_stage": 2, "offload_parameters": "cpu"}},
         "offload_parameters .* needs engine.zero_stage 3 at least, not 2"),
        ({"optimizer": {"lr": 0}}, r"optimizer.lr \(0\) must be above 0"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"optimizer.betas .* must be in \[0, 1\)"),
        ({"lora": {"rank": 0}}, r"lora.rank \(0\) must be at least 1"),
        ({"distill": {"teacher": "base"}}, "lora is null"),
        ({"distill": {"kl_weight": 0}}, r"kl_weight \(0\) and lm_weight \(0.0\) must not both be 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict({**D2O, **changes})


def test_exponents_without_a_point_are_numbers(tmp_path):
    """YAML 1.1 reads 1e-5 as a string."""
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(BASE) + "optimizer: {lr: 1e-5, eps: 1E-9}\n")
    config = TrainConfig.load(path, [("optimizer.weight_decay", "1e-1")])
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (1e-5, 1e-9, 0.1)
    with pytest.raises(ValueError, match=r"optimizer.lr \('small'\) must be a finite number"):
        TrainConfig.load(path, [("optimizer.lr", "small")])


def test_rows_of_a_step_must_divide_among_replicas():
    config = TrainConfig.from_dict({**BASE, "global_batch_size": 8, "micro_batch_size": 2})
    assert config.micro_steps(2) == 2
    with pytest.raises(ValueError, match=r"global_batch_size \(8\) must be a multiple of .*\(2\) x dp \(3\)"):
        config.micro_steps(3)


def test_the_drawn_ratio_replaces_the_size():
    config = TrainConfig.from_dict({**D2O, "d2o": {"keep_tokens": 64}})
    assert config.d2o_at(0.5).keep_ratio == 0.5 and config.d2o_at(0.5).keep_tokens is None


def test_weights_of_losses_must_not_be_negative():
    with pytest.raises(ValueError, match=r"context_lm_weight \(-1\) must be at least 0"):
        DistillConfig(context_lm_weight=-1)
