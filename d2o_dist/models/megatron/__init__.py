"""megatron-core: `GPTModel` with a compressed cache. Importing needs megatron-core 0.16 or later."""

from d2o_dist.models.megatron.attention import with_cache
from d2o_dist.models.megatron.model import MegatronModel

__all__ = ["MegatronModel", "with_cache"]
