"""DeepSpeed AutoTP: a loaded Hugging Face model cut into this rank's shard. DeepSpeed is imported when it is used."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.mpu import Mpu


def shard_with_deepspeed(model: Any, mesh: ParallelMesh, device: torch.device) -> Any:
    """Keep this rank's shard of a loaded model; linear layers become DeepSpeed's. Every rank calls it together.

    The model keeps its dtype, float64 too. It is the model itself that comes back, not an engine around it: `generate`
    stays that of transformers.

    Args:
        model: on the CPU; device: where its shard goes, this rank's GPU or the CPU.

    Raises:
        ValueError: DeepSpeed drives another kind of device.
    """
    with _quiet(mesh.rank):
        # Its logger keeps for good what is standard output now; what it prints later is a dump of the model's layers.
        with redirect_stdout(sys.stderr):
            deepspeed = _import()
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        driven = torch.device(accelerator.current_device_name())
        if driven.type != device.type:
            raise ValueError(
                f"tp_engine (deepspeed) drives {driven.type} devices here, but device is {device.type}: set "
                f"DS_ACCELERATOR={device.type}, or use tp_engine transformers"
            )
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        # It refuses dtypes that its own kernels lack; AutoTP uses none of them.
        dtypes = [*accelerator.supported_dtypes(), model.dtype]
        # Both: a group alone is replaced by ranks 0..tp-1, and with an mpu alone nothing is sharded.
        tensor_parallel = {"tp_size": mesh.tp, "tp_group": mesh.axis("tp").group, "mpu": Mpu(mesh)}
        with patch.object(accelerator, "supported_dtypes", lambda: dtypes):
            engine = deepspeed.init_inference(model, tensor_parallel=tensor_parallel, dtype=model.dtype)
    return engine.module


def check_installed() -> None:
    """Raises ValueError unless DeepSpeed can be found; it is not imported."""
    if find_spec("deepspeed") is None:
        raise ValueError(
            "tp_engine (deepspeed) needs the package deepspeed: pip install deepspeed, or use tp_engine transformers"
        )


def _import() -> Any:
    """The module, ready for `init_distributed`."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # An all_reduce through shared memory for CPU ranks: it takes minutes to compile, and sums over all ranks of the
    # machine whatever group it is given. Without it DeepSpeed uses torch.distributed.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _quiet(rank: int) -> Iterator[None]:
    """What DeepSpeed prints is dropped, and of what it logs rank 0 shows warnings, the others errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING if rank else logging.INFO)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
