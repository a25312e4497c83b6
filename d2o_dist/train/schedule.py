"""What changes from step to step: learning rate, keep ratio, random numbers. All are functions of the step alone."""

from __future__ import annotations

import math

import numpy as np

from d2o_dist.config.train_parts import OptimizerConfig

# Streams of random numbers that one seed gives, besides those of the data (0 and 1).
_RATIO_STREAM, _TORCH_STREAM = 2, 3


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of a step in `[0, steps)`: a linear rise over the warm-up, then a cosine down to `min_lr_ratio`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    low = config.min_lr_ratio
    return config.lr * (low + (1 - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def drawn_ratio(step: int, seed: int, low: float, high: float) -> float:
    """The keep ratio of a step, evenly from `[low, high]`; the same on all ranks."""
    return low if low == high else float(np.random.default_rng([seed, _RATIO_STREAM, step]).uniform(low, high))


def torch_seed(step: int, seed: int, rank: int) -> int:
    """What torch is seeded with at the beginning of a step, so that dropout does not depend on the steps before."""
    return int(np.random.default_rng([seed, _TORCH_STREAM, step, rank]).integers(2**62))
