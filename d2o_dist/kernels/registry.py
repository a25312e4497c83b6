"""Which implementation of an op serves a call: each declares what it serves, and the first one that does is taken.

    _OP = Op("column_sums", Triton("column_sums.triton:triton_column_sums"), Torch(blocked_column_sums))
    sums = _OP.pick(q, k)(q, k, lse, ...)

All implementations of an op take the same arguments. What is taken is logged once for each op and implementation; what
only this machine lacks (Triton, a GPU that is new enough) is a warning: nothing is slower in silence.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Set
from dataclasses import KW_ONLY, dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from d2o_dist.kernels import backend, launch
from d2o_dist.kernels.common import wants_grad

HALF = (torch.bfloat16, torch.float16)
# Triton, PyTorch's flash kernel and flash-attn have no kernels for earlier GPUs (Turing, Volta).
FROM_AMPERE = range(80, 1000)
# What a block of a kernel holds in registers and shared memory ends here.
HEAD_DIMS = range(257)

_logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """What a choice looks at. head_dim: the largest last dim; traits: what else is true of the call, in words."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    gradient: bool = False
    empty: bool = False
    traits: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Implementation:
    """A function, and which calls it serves.

    Attributes:
        function: itself, or "folder.file:name" below d2o_dist.kernels, imported when it is taken.
        kind: what `set_backend` chooses by: "torch", "triton" (on any device when interpreted) or "package".
        devices, dtypes, head_dims, capabilities: what it serves; None: any.
        gradient: whether gradients may be wanted; empty: whether tensors may have no elements.
        needs, without: traits that a call must have, and that it may not have.
        missing: says what is not installed, or "".
    """

    function: Callable | str
    _: KW_ONLY
    name: str = ""
    kind: str = "torch"
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: range | None = None
    capabilities: range | None = None
    gradient: bool = True
    empty: bool = True
    needs: Set[str] = frozenset()
    without: Set[str] = frozenset()
    missing: Callable[[], str] = str

    def declines(self, call: Call) -> str:
        """Why it serves no such call on any machine; "" if it does."""
        interpreted = self.kind == "triton" == backend.get_backend() and launch.is_interpreted()
        wrong = (self.needs - call.traits) | (self.without & call.traits)
        reasons = (
            (self.devices and call.device.type not in self.devices and not interpreted, f"device {call.device.type}"),
            (self.dtypes and call.dtype not in self.dtypes, str(call.dtype)),
            (self.head_dims and call.head_dim not in self.head_dims, f"head dim {call.head_dim}"),
            (call.gradient and not self.gradient, "gradient"),
            (call.empty and not self.empty, "no elements"),
            (wrong, ", ".join(trait if trait in call.traits else f"no {trait}" for trait in sorted(wrong))),
        )
        return next((reason for applies, reason in reasons if applies), "")

    def lacks(self, device: torch.device) -> str:
        """What this machine lacks for it; "" if nothing."""
        if self.capabilities and (found := launch.capability(device)) not in self.capabilities:
            return f"the GPU has compute capability {found / 10}, and kernels need {self.capabilities[0] / 10}"
        return self.missing()

    def load(self) -> Callable:
        if not isinstance(self.function, str):
            return self.function
        file, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"{__package__}.{file}"), name)

    def __str__(self) -> str:
        return self.name or getattr(self.function, "__name__", str(self.function).rpartition(":")[2])


Torch = Implementation  # PyTorch's operators: they serve what is not ruled out
Triton = partial(
    Implementation, kind="triton", devices=("cuda",), dtypes=(torch.float32, *HALF), head_dims=HEAD_DIMS,
    capabilities=FROM_AMPERE, gradient=False, empty=False,
    missing=lambda: "" if backend.has_triton() else "triton is not installed",
)  # fmt: skip


class Op:
    """An op and its implementations, in order of preference: the last one serves every call."""

    def __init__(self, name: str, *implementations: Implementation):
        self.name, self.implementations = name, implementations
        # Where it limits nothing, the last dim (slots, say) must not make a call another one.
        self._by_head_dim = any(one.head_dims for one in implementations)
        self._picked: dict[tuple[str, Call], Callable] = {}
        OPS[name] = self

    def prefer(self, implementation: Implementation) -> None:
        """Take this one before all others, where it serves."""
        self.__init__(self.name, implementation, *self.implementations)

    def pick(self, *tensors: Tensor, **traits: bool) -> Callable:
        """The function that serves a call with these tensors, all on one device, and with the traits that are true."""
        first, true = tensors[0], frozenset(trait for trait in traits if traits[trait])
        head_dim = max(x.shape[-1] for x in tensors) if self._by_head_dim else 0
        empty = not all(x.numel() for x in tensors)
        call = Call(first.device, first.dtype, head_dim, wants_grad(*tensors), empty, true)
        key = backend.get_backend(), call
        if key not in self._picked:  # the same calls come again and again
            self._picked[key] = self._choose(call)
        return self._picked[key]

    def considered(self, call: Call) -> Iterator[tuple[Implementation, str, str]]:
        """By preference, the implementations that the backend allows, why they decline, and what this machine lacks."""
        for kind in backend.BACKENDS[backend.get_backend()]:
            for one in self.implementations:
                if kind in (one.kind, "any"):
                    declined = one.declines(call)
                    yield one, declined, "" if declined else one.lacks(call.device)

    def _choose(self, call: Call) -> Callable:
        served = f"{call.device.type.replace('cuda', 'CUDA')} tensors are served by"
        for one, declined, lacking in self.considered(call):
            if lacking and one.kind != "package":
                _say(logging.WARNING, f"{lacking}: {served} slower PyTorch operators")
            if not declined and not lacking:
                _say(logging.INFO, f"{self.name}: {served} {one}")
                return one.load()
        raise AssertionError(f"{self.name}: nothing serves {call}")


OPS: dict[str, Op] = {}


def forget() -> None:
    """Choose anew, and say so again: for tests, which change the machine."""
    for op in OPS.values():
        op._picked.clear()
    _say.cache_clear()
    backend.has_triton.cache_clear()


@cache
def _say(level: int, message: str) -> None:
    _logger.log(level, message)
