"""The algorithm as pure functions on tensors: any device, any floating dtype, batched, with rows of any length."""

from d2o_dist.core.compress import compress_layer
from d2o_dist.slots.slots import D2OState, LayerBudget, Slots

__all__ = ["D2OState", "LayerBudget", "Slots", "compress_layer"]
