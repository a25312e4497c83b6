"""Shared by all tests."""

import torch
from hypothesis import settings

# Tiny models only wait for each other's threads.
torch.set_num_threads(1)

# A slow machine is not a wrong result.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
