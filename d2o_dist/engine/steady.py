"""How many rows a decode step on a CPU has, so that a row's last bits do not depend on how many others there are.

A matrix product takes a kernel by its shape, and kernels sum in different orders. Which numbers of rows share one is a
matter of the processor, of the library and of the weight. With MKL and AVX-512 these were all multiples of 4 rows on
one processor, and on another the multiples of 4, 8 or 16, by the size of the weight. So it is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from d2o_dist.comm.collectives import Collectives

# By these numbers of rows it is tried; steps of more than `MOST_ROWS` are taken to be as those of so many.
MULTIPLES = (4, 8, 16, 32)
MOST_ROWS = 64
# Some products between the smallest and the largest: kernels change at bounds.
_TIMES = (2, 3, 4, 6, 8)

_logger = logging.getLogger(__name__)
# By what a product's kernel may hang on; what was found holds as long as the process.
_found: dict[tuple, int | None] = {}


def steady_rows(model: nn.Module) -> int:
    """The smallest of `MULTIPLES` for which all products of a model on a CPU give a row the same bits in a step of any
    multiple of so many rows, in every place; the largest, with a warning, if it is none."""
    most = MULTIPLES[0]
    for weight, bias in _products(model):
        key = (weight.shape, weight.dtype, weight.stride(), bias is None, torch.get_num_threads())
        if key not in _found:
            _found[key] = next((count for count in MULTIPLES if is_steady(weight, bias, count)), None)
        if _found[key] is None:
            _warn(tuple(weight.shape), weight.dtype)
        most = max(most, _found[key] or MULTIPLES[-1])
    return most


def agreed_rows(model: nn.Module, device: torch.device, ranks: Collectives) -> int:
    """The multiple that all ranks of a request take: they have parts of the weights, or other processors, and their
    steps must be of one shape. Off a CPU the smallest one. One collective."""
    return max(ranks.all_gather_object(steady_rows(model) if device.type == "cpu" else MULTIPLES[0]))


@torch.no_grad()
def is_steady(weight: Tensor, bias: Tensor | None, multiple: int) -> bool:
    """Whether products of all multiples of so many rows with a weight [out, in] give a row the same bits."""
    row = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    counts = sorted({times * multiple for times in _TIMES if times * multiple < MOST_ROWS} | {MOST_ROWS})
    want = linear(row.expand(multiple, 1, -1).contiguous(), weight, bias)[:1]
    return all(
        torch.equal(found, want.expand_as(found))
        for found in (linear(row.expand(count, 1, -1).contiguous(), weight, bias) for count in (multiple, *counts))
    )


def _products(model: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The weights that rows are multiplied with, and what is added: each [out, in], of this process."""
    for module in model.modules():
        both = [getattr(one, "to_local", lambda one=one: one)() for name in ("weight", "bias")
                if isinstance(one := getattr(module, name, None), nn.Parameter)]  # fmt: skip
        if isinstance(module, nn.Embedding) or not both or both[0].dim() != 2 or not both[0].is_floating_point():
            continue
        yield both[0], both[1] if len(both) > 1 else None


@cache
def _warn(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _logger.warning(
        f"on this processor products with a weight {shape} of {dtype} give a row other last bits beside other numbers "
        f"of rows, multiples of {MULTIPLES[-1]} too: what a row becomes may depend on how many there are, as far as "
        "rounding goes"
    )
