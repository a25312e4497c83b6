"""Which rule decides. A policy is a score rule, a budget rule and a merge rule, each a small frozen dataclass
beside its functions.

A new rule is a class in the file of its part, and its name in that part's registry.
"""

from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.presets import PRESETS

__all__ = ["PRESETS", "D2OConfig"]
