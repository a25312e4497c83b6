"""Process groups of some ranks of the world."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """As `dist.new_group`, and waiting for peers as long as the default group does. Every rank of the world calls it.

    PyTorch gives a new group its own default: 30 minutes with gloo, 10 with NCCL.
    """
    return dist.new_group(list(ranks), timeout=group_timeout(dist.group.WORLD))


def group_timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long a group waits; None where this version of torch does not tell."""
    device = torch.device("cuda" if "nccl" in str(dist.get_backend(group)) else "cpu")
    # torch has no public name for it
    return getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
