"""What changes from step to step."""

import pytest

from d2o_dist.config.train_parts import OptimizerConfig
from d2o_dist.train.schedule import drawn_ratio, learning_rate, torch_seed


def test_rate_rises_then_falls_to_its_minimum():
    config = OptimizerConfig(lr=2.0, min_lr_ratio=0.25, warmup_steps=4)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0
    assert rates[-1] == pytest.approx(0.5) and rates[4:] == sorted(rates[4:], reverse=True)
    # Half way between the end of the warm-up (4) and the last step (19) the cosine is 0.
    assert learning_rate(12, 21, config) == pytest.approx(2.0 * (0.25 + 0.75 / 2))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_rate(steps):
    config = OptimizerConfig(lr=2.0, warmup_steps=2)
    assert all(0 < learning_rate(step, steps, config) <= 2.0 for step in range(steps))
    assert learning_rate(0, steps, OptimizerConfig(lr=2.0, warmup_steps=0)) == 2.0


def test_ratios_fill_their_range_and_depend_on_step_and_seed():
    drawn = [drawn_ratio(step, 3, 0.1, 0.5) for step in range(200)]
    assert drawn == [drawn_ratio(step, 3, 0.1, 0.5) for step in range(200)]
    assert drawn != [drawn_ratio(step, 4, 0.1, 0.5) for step in range(200)]
    assert 0.1 <= min(drawn) < 0.12 and 0.48 < max(drawn) <= 0.5
    assert drawn_ratio(9, 3, 0.2, 0.2) == 0.2


def test_ranks_and_steps_have_random_numbers_of_their_own():
    assert len({torch_seed(step, 0, rank) for step in range(5) for rank in range(5)}) == 25
