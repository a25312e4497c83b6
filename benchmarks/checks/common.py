"""A check: a name, an op, and a function from a device to named errors with their limits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2o_dist.kernels.backend import get_backend, set_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Limits of |got - want| / (1 + |want|): outputs are rounded to their dtype; statistics are float32 in every dtype, from
# products that are exact, so what remains is the order of additions.
OUT_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
STATISTICS_LIMIT = 5e-5


@dataclass
class Result:
    """Named errors of one check, each with its limit."""

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def near(self, name: str, got: Tensor, want: Tensor, limit: float) -> None:
        """Note the largest error; infinities must agree, NaN and another shape are infinitely wrong."""
        self.errors[name] = (relative_error(got, want), limit)

    def equal(self, name: str, got: Tensor, want: Tensor) -> None:
        """Note the fraction of entries that differ; none may."""
        same = got.shape == want.shape
        wrong = (got.cpu() != want.cpu()).double().mean().item() if same and got.numel() else 0.0
        self.errors[name] = (wrong if same else float("inf"), 0.0)

    @property
    def is_right(self) -> bool:
        return all(error <= limit for error, limit in self.errors.values())


@dataclass(frozen=True)
class Check:
    """`run(device)` computes one case with the kernel and with the oracle. needs_cuda: it cannot be interpreted."""

    op: str
    name: str
    run: Callable[[str], Result]
    needs_cuda: bool = False


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / (1 + |want|), where infinities must be the same ones."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    infinite = want.isinf()
    if not torch.equal(got[infinite], want[infinite]) or not bool(got[~infinite].isfinite().all()):
        return float("inf")
    error = (got - want).abs() / (1 + want.abs())
    return error[~infinite].max().item() if bool((~infinite).any()) else 0.0


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def on_cpu(*tensors: Tensor | None) -> list[Tensor | None]:
    """float64 copies for an oracle; NaN, where a case hides it, becomes 0. Booleans and indices as they are."""

    def copy(x: Tensor) -> Tensor:
        return x.cpu().double().nan_to_num(0.0, torch.inf, -torch.inf) if x.is_floating_point() else x.cpu()

    return [None if x is None else copy(x) for x in tensors]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is filled with NaN (integers: their maximum), so that what a kernel does not write is seen."""
    was, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Ops use this backend."""
    before = get_backend()
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def in_each_dtype(op: str, cases: dict[str, object], run: Callable[[object, torch.dtype, str], Result]) -> list[Check]:
    """A check for each named case and dtype."""
    return [
        Check(op, f"{name}-{str(dtype).removeprefix('torch.')}", lambda device, c=case, d=dtype: run(c, d, device))
        for name, case in cases.items()
        for dtype in DTYPES
    ]
