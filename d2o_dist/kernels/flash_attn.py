"""The packages flash-attn-3 and flash-attn (2), where they are installed: what they take and how they are called.

Both want [B, T, H, D], align a causal mask bottom right (the last query sees the last key), and give the lse as
[B, Hq, Tq], float32, natural log. One call serves a whole prompt, a chunk or a window. Neither package was run for this
repository: no GPU was at hand. The calls follow their published signatures.
"""

import importlib
import importlib.util
import inspect
import logging
from functools import cache, partial

import torch
from torch import Tensor

from d2o_dist.kernels.registry import FROM_AMPERE, HALF, Implementation

# flash-attn has windows since 2.3; the mask of fewer queries than keys is aligned bottom right since 2.1.
_ARGUMENTS = ("softmax_scale", "causal", "window_size", "return_attn_probs")
_logger = logging.getLogger(__name__)


def flash_attn(causal: bool) -> tuple[Implementation, ...]:
    """What serves attention of prompts, the newest first: version 3 was written for Hopper, and is used there."""
    packages = ((3, "flash_attn_interface", range(90, 100)), (2, "flash_attn", FROM_AMPERE))
    return tuple(
        Implementation(
            partial(attend, package, causal), name=f"flash-attn {version}", kind="package", devices=("cuda",),
            dtypes=HALF, head_dims=range(8, 257, 8), capabilities=capabilities, gradient=False, empty=False,
            without={"bias", "softcap", "two_dims"}, missing=partial(unusable, package),
        )
        for version, package, capabilities in packages
    )  # fmt: skip


@cache
def unusable(name: str) -> str:
    """Why the package cannot be used, a warning if it is installed; "" if it can be."""
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    why = ""
    try:
        missing = set(_ARGUMENTS) - set(inspect.signature(importlib.import_module(name).flash_attn_func).parameters)
        if missing:
            why = f"{name} is too old to be used: flash_attn_func has no {', '.join(sorted(missing))}"
    except Exception as error:  # noqa: BLE001 - built for another torch, most often; it may fail in any way
        why = f"{name} is installed but cannot be used: {error}"
    if why:
        _logger.warning("%s", why)
    return why


def attend(
    package: str, causal: bool, q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int = 0,
    window: int | None = None, bias: None = None, softcap: None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D] -> out [B, Hq, Tq, D], lse [B, Hq, Tq] float32, contiguous.

    causal: query i sees the keys up to i + Tk - Tq; window (needs causal): only the last so many of them.

    Raises:
        RuntimeError: the package gave an lse of another layout.
    """
    out, lse, *_ = importlib.import_module(package).flash_attn_func(
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
