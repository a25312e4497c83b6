"""Which implementation an op uses: Triton for CUDA tensors, PyTorch's operators otherwise, or what was set by hand."""

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from d2o_dist.kernels.launch import capability, is_interpreted

BACKENDS = ("auto", "torch", "triton")
# Triton and PyTorch's flash kernel have none for earlier GPUs (Turing, Volta).
MIN_CAPABILITY = 80
# What a block of a kernel holds in registers and shared memory ends here.
MAX_HEAD_DIM = 256
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_logger = logging.getLogger(__name__)
_chosen = "auto"


def set_backend(name: str) -> None:
    """`auto`: by device, dtype and whether flash-attn is installed. `torch`: PyTorch's operators only. `triton`: our
    kernels also where PyTorch or flash-attn has one.

    Under TRITON_INTERPRET=1 `triton` takes CPU tensors too.

    Raises:
        ValueError: another name, or `triton` without Triton.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend ({name!r}) must be one of {', '.join(BACKENDS)}")
    if name == "triton" and not has_triton():
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    _chosen = name


def get_backend() -> str:
    """What was last given to `set_backend`; `auto` before that."""
    return _chosen


@cache
def has_triton() -> bool:
    """Whether the package is installed. It is imported only when a kernel is needed."""
    return importlib.util.find_spec("triton") is not None


def takes_triton(*tensors: Tensor, head_dim: int = 1) -> bool:
    """Whether Triton kernels serve these tensors (all of one device): device, dtype, head dim, no gradient wanted.

    The choice is logged once. CUDA tensors without Triton installed are served by PyTorch's operators, with a warning.
    """
    first = tensors[0]
    if _chosen == "torch" or first.dtype not in TRITON_DTYPES:
        return False
    if first.device.type != "cuda" and not (_chosen == "triton" and is_interpreted()):
        return False
    if head_dim > MAX_HEAD_DIM or wants_grad(*tensors) or not has_kernels(first.device):
        return False
    if not has_triton():
        _say(logging.WARNING, "triton is not installed: CUDA tensors are served by slower PyTorch operators")
        return False
    _say(logging.INFO, "CUDA tensors are served by Triton kernels")
    return True


def has_kernels(device: torch.device) -> bool:
    """Whether Triton and PyTorch's flash kernel serve this device; a GPU that is too old for them is a warning."""
    if device.type != "cuda" or (found := capability(device)) >= MIN_CAPABILITY:
        return True
    needed, found = (f"{number // 10}.{number % 10}" for number in (MIN_CAPABILITY, found))
    _say(logging.WARNING, f"the GPU has compute capability {found}, and kernels need {needed}: its tensors are served "
                          "by slower PyTorch operators")  # fmt: skip
    return False


def wants_grad(*tensors: Tensor) -> bool:
    """Whether autograd would have to see this call; no kernel of ours has a backward."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@cache
def _say(level: int, message: str) -> None:
    _logger.log(level, message)
