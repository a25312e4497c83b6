"""The packages flash-attn-3 and flash-attn (2), where they are installed: what they take and how they are called.

Both want [B, T, H, D], align a causal mask bottom right (the last query sees the last key), and give the lse as
[B, Hq, Tq], float32, natural log. One call serves a whole prompt, a chunk or a window. Neither package was run for this
repository: no GPU was at hand. The calls follow their published signatures.
"""

import importlib
import importlib.util
import inspect
import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from d2o_dist.kernels.backend import get_backend, wants_grad
from d2o_dist.kernels.launch import capability

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# flash-attn has windows since 2.3; the mask of fewer queries than keys is aligned bottom right since 2.1.
_ARGUMENTS = ("softmax_scale", "causal", "window_size", "return_attn_probs")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlashAttention:
    """One of the two packages.

    Attributes:
        version: 2 or 3.
        module: what has `flash_attn_func`.
    """

    version: int
    module: ModuleType

    def takes(self, q: Tensor) -> bool:
        """Whether the package has a kernel for these queries [B, Hq, Tq, D] on their device."""
        generation = capability(q.device)
        # Version 3 is used on Hopper, which it was written for; version 2 has kernels from Ampere on.
        on_device = generation // 10 == 9 if self.version == 3 else generation >= 80
        return on_device and q.dtype in DTYPES and q.shape[3] <= MAX_HEAD_DIM and q.shape[3] % 8 == 0

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D] -> out [B, Hq, Tq, D], lse [B, Hq, Tq] float32, contiguous.

        causal: query i sees the keys up to i + Tk - Tq; window (needs causal): only the last so many of them.

        Raises:
            RuntimeError: the package gave an lse of another layout.
        """
        out, lse, *_ = self.module.flash_attn_func(
            *(x.transpose(1, 2) for x in (q, k, v)),
            softmax_scale=scale,
            causal=causal,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            return_attn_probs=True,
        )
        if lse.shape != q.shape[:3] or lse.dtype != torch.float32:
            raise RuntimeError(
                f"flash_attn_func gave an lse {tuple(lse.shape)} {lse.dtype}, not {tuple(q.shape[:3])} torch.float32: "
                'this version of flash-attn is not supported; do without it by set_backend("torch")'
            )
        return out.transpose(1, 2), lse.contiguous()


@cache
def installed() -> tuple[FlashAttention, ...]:
    """The packages that can be used, newest first. One that is installed and cannot be used is a warning."""
    found = []
    for version, name in ((3, "flash_attn_interface"), (2, "flash_attn")):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
            missing = set(_ARGUMENTS) - set(inspect.signature(module.flash_attn_func).parameters)
        except (ImportError, OSError, AttributeError) as error:  # built for another torch, most often
            _logger.warning("%s is installed but cannot be used: %s", name, error)
            continue
        if missing:
            _logger.warning("%s is too old to be used: flash_attn_func has no %s", name, ", ".join(sorted(missing)))
            continue
        found.append(FlashAttention(version, module))
    return tuple(found)


def flash_attention_for(q: Tensor, k: Tensor, v: Tensor) -> FlashAttention | None:
    """The package that serves these prompts with backend `auto`, if one is installed. Said once."""
    if q.device.type not in DEVICES or get_backend() != "auto" or wants_grad(q, k, v) or not q.numel():
        return None
    package = next((package for package in installed() if package.takes(q)), None)
    if package is not None:
        _say(f"prompts of CUDA tensors are served by flash-attn {package.version}")
    return package


@cache
def _say(message: str) -> None:
    _logger.info(message)
