"""The algorithm as pure functions on tensors: any device, any floating dtype, batched, with rows of any length."""
