"""What a CUDA graph does, on a CPU: a forward's operators are recorded with their tensors, and run again on the same
memory, without Python. And what a capture forbids: asking the device, and shapes that depend on data.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Methods that read numbers out of a tensor; some of them never reach the dispatcher on a CPU.
_READS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__",
    "__repr__", "__format__", "nonzero", "equal", "allclose", "is_nonzero", "unique", "masked_select",
}  # fmt: skip
# Functions that make tensors of Python numbers: on CUDA a copy from pageable memory, which a capture refuses.
_MAKES = {"tensor", "as_tensor", "from_numpy", "asarray"}
_FORBIDDEN_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)


class HostSync(AssertionError):
    """A forward asked the device, or made a tensor of the host's numbers."""


class _FunctionWatch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _READS or (name in _MAKES and not isinstance(args[0], Tensor)):
            raise HostSync(f"{name} was called in a step")
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    """Refuses operators whose result or shape the host would have to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
        if by_mask:
            forbidden = any(x is not None and x.dtype == torch.bool for x in args[1])
        else:
            forbidden = any(tag in func.tags for tag in _FORBIDDEN_TAGS)
        if forbidden or name == "aten::lift_fresh":
            raise HostSync(f"{func} was called in a step")
        with self:
            parts = func.decompose(*args, **kwargs)
        return self.run(func, args, kwargs) if parts is NotImplemented else parts

    def run(self, func, args, kwargs):
        return func(*args, **kwargs)


@contextmanager
def watched():
    """Raises `HostSync` at whatever a capture would refuse."""
    with _FunctionWatch(), _Watch():
        yield


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recording(_Watch):
    """Operators in order, each with the very tensors it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self._fresh: set[int] = set()
        self._before: dict[int, tuple] = {}

    def run(self, func, args, kwargs):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {_storage(x) for x in inputs}
        for tensor in self._written(func, args, kwargs):
            key = _storage(tensor)
            if key not in self._fresh and key not in self._before:
                self._before[key] = (tensor.untyped_storage(), tensor.untyped_storage().clone())
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        new = [_storage(x) not in known for x in made]
        self._fresh |= {_storage(x) for x, is_new in zip(made, new, strict=True) if is_new}
        if func._schema.is_mutable or any(new) or not made:
            self.calls.append((func, args, kwargs, made, new))
        return out

    @staticmethod
    def _written(func, args, kwargs):
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name, args[place] if place < len(args) else None)
                yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))

    def undo(self) -> None:
        """Memory that was there before the recording, as it was: a capture runs nothing."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def poison(self) -> None:
        """Memory that the recording made holds nothing between replays."""
        for _, _, _, made, new in self.calls:
            for tensor, is_new in zip(made, new, strict=True):
                if is_new and tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def replay(self) -> None:
        for func, args, kwargs, made, new in self.calls:
            found = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for tensor, value, is_new in zip(made, found, new, strict=True):
                if is_new:
                    assert tensor.shape == value.shape, f"{func} gave {tuple(value.shape)}, not {tuple(tensor.shape)}"
                    tensor.copy_(value)


class TapeRecorder:
    """A `Recorder` for CPU tensors.

    Attributes:
        num_warm, num_recorded: how often it warmed up and recorded.
    """

    def __init__(self) -> None:
        self.num_warm = self.num_recorded = 0

    def warm_up(self, run: Callable[[], Tensor]) -> tuple[Tensor, str | None]:
        """Run it, watched."""
        self.num_warm += 1
        with watched():
            return run(), None

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record it, and undo what it did."""
        self.num_recorded += 1
        tape = _Recording()
        try:
            with _FunctionWatch(), tape:
                result = run()
        finally:
            tape.undo()

        def replay() -> Tensor:
            tape.poison()
            tape.replay()
            return result

        return replay
