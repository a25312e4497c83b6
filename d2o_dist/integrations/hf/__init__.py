"""Hugging Face transformers: `attn_implementation="d2o"` and `D2OCache`. Importing registers the name, no more."""

from d2o_dist.integrations.hf.attention import register
from d2o_dist.integrations.hf.cache import D2OCache
from d2o_dist.integrations.hf.generation import FirstRankScores
from d2o_dist.integrations.hf.guards import check_version

check_version()
register()

__all__ = ["D2OCache", "FirstRankScores"]
