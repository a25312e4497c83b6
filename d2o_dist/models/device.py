"""The device that a model goes to."""

from __future__ import annotations

import torch

from d2o_dist.comm.launch import read_environment


def pick_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means; of several ranks, each has the GPU of its local rank.

    Raises:
        ValueError: a CUDA device that this machine does not have, or one by number for several ranks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    device, launch = torch.device(name), read_environment()
    if device.type == "cuda" and launch.world_size > 1:
        if device.index is not None:
            raise ValueError(f"device ({name}) is one GPU for {launch.world_size} ranks: use auto or cuda")
        device = torch.device("cuda", launch.local_rank)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device ({device}) is not there: this machine has {count} CUDA devices")
    return device
