"""Hugging Face transformers: `attn_implementation="d2o"` and `D2OCache`. Importing registers the name, no more."""

from d2o_dist.models.hf.attention import register
from d2o_dist.models.hf.cache import D2OCache
from d2o_dist.models.hf.forward import run_model
from d2o_dist.models.hf.generation import FirstRankScores
from d2o_dist.models.hf.guards import check_version
from d2o_dist.models.hf.model import HFModel

check_version()
register()

__all__ = ["D2OCache", "FirstRankScores", "HFModel", "run_model"]
