"""Shared by all tests: one thread a process, since tiny models only wait for each other's threads."""

import torch

torch.set_num_threads(1)
