"""What was asked for: the kinds of implementations that ops may use."""

import importlib.util
from functools import cache

# Which kinds of implementations, in order of preference; of a kind, in the order of each op.
BACKENDS = {"auto": ("any",), "torch": ("torch",), "triton": ("triton", "torch")}
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
