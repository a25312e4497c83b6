"""Which implementation an op takes, on machines that are only described: the tensors have a device and no memory."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from d2o_dist.kernels import backend, flash_attn, launch, registry
from d2o_dist.kernels.column_peaks import column_peaks
from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.decode_attention import decode_attention, decode_with_logits
from d2o_dist.kernels.finish_decode import finish_decode, slot_probabilities
from d2o_dist.kernels.merge_into import merge_into
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.kernels.prefill_attention import cross_attention, prefill_attention
from d2o_dist.kernels.scored_decode import scored_decode, scored_decode_of_heads
from d2o_dist.kernels.scored_prefill import scored_prefill_attention
from d2o_dist.kernels.segments import Segments
from tests.kernels import fake_flash_attn

FLASH = {2: "flash_attn", 3: "flash_attn_interface"}
# What a call reaches first, by the name of the function, and how the table calls it.
REACHED = {
    "blocked_column_sums": "B", "blocked_column_peaks": "B", "blocked_nearest_kept": "B", "blocked_merge_into": "B",
    "blocked_decode_attention": "B", "blocked_decode_with_logits": "B", "torch_slot_probabilities": "B",
    "torch_finish_decode": "B", "blocked_prefill_attention": "B", "blocked_cross_attention": "B",
    "cpu_prefill_attention": "C", "cpu_cross_attention": "C", "cpu_scored_prefill": "C",
    "cuda_prefill_attention": "G", "cuda_cross_attention": "G", "flash_attn_func_2": "2", "flash_attn_func_3": "3",
}  # fmt: skip
# By their own function: what they reach first serves other ops too.
REACHED_BY = {
    "scored_decode": {"by_probabilities": "B"},
    "scored_decode_of_heads": {"one_by_one": "B"},
    "scored_prefill": {"cpu_scored_prefill": "C", "prefill_attention": "B"},
}


@dataclass(frozen=True)
class Situation:
    """Tensors of a call, the machine they lie on, and what was set."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    dim: int = 64
    batch: int = 1
    grad: bool = False
    backend: str = "auto"
    capability: int = 90
    triton: bool = True
    flash: tuple[int, ...] = ()
    interpreted: bool = False


class Reached(BaseException):
    """Not an Exception, so that nothing on the way takes it for an error of its own."""


class TritonFile(ModuleType):
    """Stands for a file of kernels: whatever is called in it is what was chosen."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*args, **kwargs):
            raise Reached("T")

        return kernel


@contextmanager
def machine(situation: Situation) -> Iterator[None]:
    """The packages, the GPU and the setting of a situation."""
    find, load = importlib.util.find_spec, importlib.import_module
    there = {FLASH[version] for version in situation.flash} | ({"triton"} if situation.triton else set())

    def find_spec(name, *rest):
        return (name in there or None) if name in {*FLASH.values(), "triton"} else find(name, *rest)

    def import_module(name, *rest):
        return fake_flash_attn.MODULES[name] if name in there and name in FLASH.values() else load(name, *rest)

    folders = (
        "column_peaks", "column_sums", "decode_attention", "merge_into", "nearest_kept", "prefill_attention",
        "finish_decode", "scored_decode",
    )  # fmt: skip
    stubs = {name: TritonFile(name) for name in (f"d2o_dist.kernels.{folder}.triton" for folder in folders)}
    with ExitStack() as stack:
        enter = stack.enter_context
        stack.callback(forget)
        enter(patch.object(importlib.util, "find_spec", find_spec))
        enter(patch.object(importlib, "import_module", import_module))
        enter(patch.object(launch, "_capability_of_gpu", lambda device: situation.capability))
        enter(patch.dict(sys.modules, stubs))
        enter(patch.dict("os.environ", {"TRITON_INTERPRET": str(int(situation.interpreted))}))
        forget()
        enter(patch.object(backend, "_chosen", situation.backend))
        yield


def forget() -> None:
    """What was found about another machine."""
    registry.forget()
    flash_attn.unusable.cache_clear()


def chosen(op: str, situation: Situation) -> str:
    """A letter of the table, `!` for an error, `-` where nothing is computed. Inside `machine(situation)`."""
    names = REACHED_BY.get(op.split()[0], REACHED)

    def stop(frame, event, argument):
        if event == "call" and frame.f_code.co_name in names and "kernels" in frame.f_code.co_filename:
            raise Reached(names[frame.f_code.co_name])

    with FakeTensorMode():
        call = CALLS[op](situation)
        sys.setprofile(stop)
        try:
            call()
        except Reached as reached:
            return str(reached)
        except RuntimeError as error:
            assert "has no gradient" in str(error), error
            return "!"
        finally:
            sys.setprofile(None)
    return "-"


def empty(s: Situation, *shape: int, dtype: torch.dtype | None = None, plain: bool = False) -> torch.Tensor:
    """plain: without gradient. Autograd cannot follow an operator on a device that this build of PyTorch lacks."""
    x = torch.empty(s.batch, *shape, dtype=dtype or s.dtype, device=s.device)
    return x.requires_grad_(s.grad and not plain and x.is_floating_point())


def columns(op: Callable, s: Situation):
    return lambda: op(empty(s, 4, 3, s.dim), empty(s, 2, 8, s.dim), empty(s, 4, 3), 0.1, q_start=5)


def nearest(s: Situation):
    return lambda: nearest_kept(empty(s, 2, 3, s.dim), empty(s, 2, 8, s.dim), empty(s, 2, 8, dtype=torch.bool))


def merge(s: Situation):
    kept, evicted, weight = empty(s, 2, 8, s.dim), empty(s, 2, 3, s.dim), empty(s, 2, 3, plain=True)
    target, merged = (empty(s, 2, 3, dtype=dtype) for dtype in (torch.int64, torch.bool))
    return lambda: merge_into((kept, kept), (evicted, evicted), weight, target, merged, 1.0)


def decode(op: Callable, s: Situation, scored: bool = False, **more):
    valid, newest = empty(s, 2, 8, dtype=torch.bool), empty(s, 1, dtype=torch.int64)
    tensors = empty(s, 4, s.dim, plain=True), empty(s, 2, 8, s.dim), empty(s, 2, 8, s.dim)
    more |= {"newest": newest} if op is scored_decode else {}
    more |= {"scores": torch.empty(s.batch, 2, 8, device=s.device)} if scored else {}
    return lambda: op(*tensors, 0.1, valid=valid, **more)


def of_heads(s: Situation):
    slots = torch.empty(9, s.dim, dtype=s.dtype, device=s.device).requires_grad_(s.grad)
    statistics = torch.empty(9, device=s.device)
    segments = Segments(empty(s, 2, dtype=torch.int64), empty(s, 2, dtype=torch.int64), 5, ((0, 5), (5, 4)))
    options = dict(log_mass=None, softcap=None, rates=None, peaks=False, rate_window=32, present=None, total=None)
    return lambda: scored_decode_of_heads(
        empty(s, 4, s.dim, plain=True), slots, slots, 0.1, segments, widths=[[5], [4]],
        valid=torch.empty(9, dtype=torch.bool, device=s.device), newest=empty(s, 2, dtype=torch.int64),
        scores=statistics, new=None, **options,
    )  # fmt: skip


def finish(s: Situation, **more):
    outs = torch.empty(3, s.batch, 4, s.dim, dtype=s.dtype, device=s.device).requires_grad_(s.grad)
    lses, logits = torch.empty(3, s.batch, 4, device=s.device), empty(s, 4, 8, plain=True)
    scores = torch.empty(s.batch, 2, 8, device=s.device)
    return lambda: finish_decode(outs, lses, logits, s.dtype, num_kv_heads=2, scores=scores, **more)


def prompt(op: Callable, s: Situation, past: int = 0, biased: bool = False, **more):
    tensors = empty(s, 4, 3, s.dim), *(empty(s, 2, past + 3, s.dim) for _ in range(2))
    more |= {} if op is cross_attention else {"q_start": past}
    more |= {"bias": torch.empty(s.batch, 2, past + 3, device=s.device)} if biased else {}
    return lambda: op(*tensors, 0.1, **more)


CALLS: dict[str, Callable[[Situation], Callable]] = {
    "column_sums": lambda s: columns(column_sums, s),
    "column_peaks": lambda s: columns(column_peaks, s),
    "nearest_kept": nearest,
    "merge_into": merge,
    "decode_attention": lambda s: decode(decode_attention, s),
    "decode_with_logits": lambda s: decode(decode_with_logits, s),
    "slot_probabilities": lambda s: lambda: slot_probabilities(empty(s, 4, 8), empty(s, 4), 2),
    "finish_decode": finish,
    "finish_decode total": lambda s: finish(s, total=lambda x: x),
    "scored_decode": lambda s: decode(scored_decode, s, scored=True),
    "scored_decode not": lambda s: decode(scored_decode, s),
    "scored_decode peaks": lambda s: decode(scored_decode, s, scored=True, peaks=True),
    "scored_decode total": lambda s: decode(scored_decode, s, scored=True, total=lambda x: x),
    "scored_decode_of_heads": of_heads,
    "scored_prefill": lambda s: prompt(scored_prefill_attention, s, past=5),
    "prefill_attention": lambda s: prompt(prefill_attention, s),
    "prefill_attention chunk": lambda s: prompt(prefill_attention, s, past=5),
    "prefill_attention window": lambda s: prompt(prefill_attention, s, past=5, window=2),
    "prefill_attention bias": lambda s: prompt(prefill_attention, s, past=5, biased=True),
    "prefill_attention both": lambda s: prompt(prefill_attention, s, past=5, window=2, biased=True),
    "cross_attention": lambda s: prompt(cross_attention, s),
    "cross_attention bias": lambda s: prompt(cross_attention, s, biased=True),
}
