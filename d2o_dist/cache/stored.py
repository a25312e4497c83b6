"""What a cache holds as plain values and tensors, and back: to store it in a file, or to move it to another device.

Everything is taken as it lies, tensors that share memory with others too (a layer's slots are views of the arena), and
what was read of a prompt that is not compressed yet. A cache that is put together again therefore goes on to the bit.
Only objects of the classes named here are made, and nothing is called but these.
"""

from __future__ import annotations

import dataclasses
import dis
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2o_dist.cache.block import HeadBlock
from d2o_dist.cache.columns import Columns
from d2o_dist.cache.dealing import Dealing
from d2o_dist.cache.decoding import Decoding
from d2o_dist.cache.layer import HeadElsewhere, Layer
from d2o_dist.cache.order import Order
from d2o_dist.cache.plans import RowBudgets
from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.cache.tiles import Tiles
from d2o_dist.cache.window import WindowLayer
from d2o_dist.comm.deal import Deal, Placement
from d2o_dist.comm.request import RequestRanks
from d2o_dist.comm.shard import Contiguous, Zigzag
from d2o_dist.core.softmax import Softmax
from d2o_dist.evict.arena import ArenaEvictions
from d2o_dist.evict.exchange import ByHeads, BySequence
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.layout.heads import HeadLayout
from d2o_dist.layout.sequence import SequenceLayout
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.rule import plain, rule_from
from d2o_dist.policy.storage import FORMATS, StorageFormat
from d2o_dist.slots.arena import Arena, Block
from d2o_dist.slots.codec import Codec
from d2o_dist.slots.rows import Rows
from d2o_dist.slots.shares import Shares
from d2o_dist.slots.slots import D2OState, Slots
from d2o_dist.slots.store import SlotStore
from d2o_dist.slots.windows import Chunked
from d2o_dist.statistics.column_sums import ColumnSums
from d2o_dist.statistics.last_queries import LastQueries
from d2o_dist.statistics.peaks import Peaks
from d2o_dist.statistics.reading import Reading

_CLASSES = {
    kind.__name__: kind
    for kind in (
        Arena, ArenaEvictions, Block, ByHeads, BySequence, Chunked, Codec, ColumnSums, Columns, Contiguous, D2OState,
        Deal, Dealing, Decoding, HeadBlock, HeadElsewhere, HeadLayout, LastQueries, Layer, Order, Peaks, Placement,
        Reading, RowBudgets, Rows, SequenceLayout, Shares, SlotStore, Slots, Softmax, Tiles, WindowLayer, Zigzag,
    )
}  # fmt: skip
# Named, not stored: a layout's class, and a kernel.
_NAMED = {"HeadLayout": HeadLayout, "SequenceLayout": SequenceLayout, "nearest_kept": nearest_kept}
# Attributes whose tensors lie on the host, wherever the cache is: they count tokens. None: all of the class.
_ON_HOST: dict[type, tuple[str, ...] | None] = {
    Reading: ("tokens",), LastQueries: ("tokens",), Rows: None, Placement: None, Contiguous: None, Zigzag: None,
}  # fmt: skip
_CONTAINERS: dict[str, type] = {"list": list, "tuple": tuple, "frozenset": frozenset}
_PLAIN = (bool, int, float, str, type(None))


@dataclass
class Stored:
    """A cache in parts.

    Attributes:
        entries: every object, container and tensor, as values that JSON can hold; they name each other by number. The
            first one is the cache.
        memory: [n] each, the memory that tensors lie in, once each; on_host: whether it belongs on the host.
    """

    entries: list[list[Any]]
    memory: list[Tensor]
    on_host: list[bool]


def take_apart(cache: CompressedCache) -> Stored:
    """The parts of a cache; tensors are not copied.

    Raises:
        ValueError: in the middle of a forward or a decode step, or something that is not known here.
    """
    if cache.in_forward or cache.step_announced or cache.dealing.is_announced:
        raise ValueError("a cache cannot be stored or moved in the middle of a forward or a decode step")
    return _Taker(cache).parts


def put_together(cache: CompressedCache, stored: Stored) -> None:
    """Let an empty cache of the same windows and ranks hold these parts. Their memory becomes the cache's.

    Raises:
        ValueError: parts that do not fit together, or are those of another version of this library.
    """
    try:
        state = _Putter(cache, stored).value({"at": 0})
    except (LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"its parts do not fit together ({error})") from error
    _check_complete(type(cache), state if isinstance(state, dict) else {}, set(vars(cache)) - {"ranks"})
    vars(cache).update(state)


class _Taker:
    """Takes one cache apart, into `parts`."""

    def __init__(self, cache: CompressedCache) -> None:
        self.parts = Stored([], [], [])
        # Of what was met: its number, and itself, for the number of an object that is gone may come again.
        self._known: dict[int, tuple[int, Any]] = {}
        self._memory: dict[int, int] = {}
        self.value({name: value for name, value in vars(cache).items() if name != "ranks"})

    def value(self, one: Any, on_host: bool = False) -> Any:
        """A plain value as it is; of others the entry's number."""
        if type(one) in _PLAIN:
            return one
        if isinstance(one, float):  # NumPy's
            return float(one)
        if id(one) not in self._known:
            number = len(self.parts.entries)
            self._known[id(one)] = number, one
            self.parts.entries.append([])
            self.parts.entries[number] = self._entry(one, on_host)
        return {"at": self._known[id(one)][0]}

    def _entry(self, one: Any, on_host: bool) -> list[Any]:
        kind = type(one)
        for name, known in _CONTAINERS.items():
            if kind is known:
                return [name, [self.value(part, on_host) for part in one]]
        if kind is dict:
            return ["dict", [[self.value(key), self.value(part, on_host)] for key, part in one.items()]]
        if isinstance(one, Tensor):
            return ["tensor", *self._tensor(one, on_host)]
        if kind is bytearray:
            return ["bytes", self._tensor(torch.frombuffer(one, dtype=torch.uint8) if one else torch.zeros(0), True)[0]]
        if isinstance(one, RequestRanks):
            return ["ranks"]
        if kind is D2OConfig:
            return ["config", one.to_dict()]
        if isinstance(one, StorageFormat):
            return ["storage", plain(one)]
        if kind is torch.dtype:
            return ["dtype", str(one).removeprefix("torch.")]
        if name := next((name for name, known in _NAMED.items() if known is one), None):
            return ["named", name]
        if _CLASSES.get(kind.__name__) is not kind:
            raise ValueError(f"a cache that holds a {kind.__name__} cannot be stored or moved")
        names = _ON_HOST.get(kind, ())
        state = {
            name: self.value(part, on_host or names is None or name in names)
            for name, part in (one.__getstate__() or {}).items()
        }
        return ["object", kind.__name__, state]

    def _tensor(self, tensor: Tensor, on_host: bool) -> list[Any]:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = len(self.parts.memory)
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            self.parts.memory.append(flat.set_(storage, 0, (storage.nbytes() // tensor.element_size(),)))
            self.parts.on_host.append(on_host)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return [self._memory[storage._cdata], dtype, list(tensor.shape), list(tensor.stride()), tensor.storage_offset()]


class _Putter:
    """Puts the parts of a cache together."""

    def __init__(self, cache: CompressedCache, stored: Stored) -> None:
        self._stored, self._ranks = stored, cache.ranks
        self._made: dict[int, Any] = {}

    def value(self, stored: Any) -> Any:
        """What `_Taker.value` was given."""
        if type(stored) in _PLAIN:
            return stored
        number = stored["at"]
        if number not in self._made:
            kind, *rest = self._stored.entries[number]
            self._made[number] = getattr(self, f"_make_{kind}")(number, *rest)
        return self._made[number]

    def _make_list(self, number: int, parts: list[Any]) -> list[Any]:
        return [self.value(part) for part in parts]

    def _make_tuple(self, number: int, parts: list[Any]) -> tuple[Any, ...]:
        return tuple(self.value(part) for part in parts)

    def _make_frozenset(self, number: int, parts: list[Any]) -> frozenset[Any]:
        return frozenset(self.value(part) for part in parts)

    def _make_dict(self, number: int, parts: list[Any]) -> dict[Any, Any]:
        return {self.value(key): self.value(part) for key, part in parts}

    def _make_tensor(
        self, number: int, memory: int, dtype: str, shape: list[int], stride: list[int], offset: int
    ) -> Tensor:
        return self._stored.memory[memory].view(getattr(torch, dtype)).as_strided(shape, stride, offset)

    def _make_bytes(self, number: int, memory: int) -> bytearray:
        return bytearray(self._stored.memory[memory].numpy().tobytes())

    def _make_ranks(self, number: int) -> RequestRanks:
        return self._ranks

    def _make_config(self, number: int, values: dict[str, Any]) -> D2OConfig:
        return D2OConfig.from_dict(values)

    def _make_storage(self, number: int, values: Any) -> StorageFormat:
        return rule_from(values, FORMATS, "storage")

    def _make_dtype(self, number: int, name: str) -> torch.dtype:
        return getattr(torch, name)

    def _make_named(self, number: int, name: str) -> Any:
        return _NAMED[name]

    def _make_object(self, number: int, name: str, state: dict[str, Any]) -> Any:
        kind = _CLASSES[name]
        _check_complete(kind, state, _attributes(kind))
        made = self._made[number] = object.__new__(kind)
        vars(made).update({attribute: self.value(part) for attribute, part in state.items()})
        return made


def _attributes(kind: type) -> set[str]:
    """What every object of a class has: its fields, or what its `__init__` sets."""
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return {line.argval for line in dis.get_instructions(kind.__init__) if line.opname == "STORE_ATTR"}


def _check_complete(kind: type, state: dict[str, Any], wanted: set[str]) -> None:
    if missing := sorted(wanted - set(state)):
        raise ValueError(f"it is of another version of d2o_dist: a {kind.__name__} has no {', '.join(missing)} there")
