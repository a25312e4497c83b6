"""d2o_dist: compressed KV caches (D2O, ICLR 2025) for long-context inference, evaluation and training.

    from d2o_dist import D2OCache, D2OConfig
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="d2o")
    cache = D2OCache(config=model.config, d2o=D2OConfig(keep_ratio=0.2))
    model.generate(**inputs, past_key_values=cache)
"""

from d2o_dist.models.hf import D2OCache
from d2o_dist.policy import D2OConfig

__version__ = "0.1.0"
__all__ = ["D2OCache", "D2OConfig"]
