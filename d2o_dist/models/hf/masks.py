"""The mask function of `attn_implementation="d2o"`: what the model's mask says, and the mask itself where it is read.

Shape legend: B rows, n queries, S keys, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

from d2o_dist.slots.windows import Chunked, Window

# Functions of transformers whose masks are read here; of another version some may be missing, and are then not read.
_PACKED = ("packed_sequence_mask_function", "remap_positions_for_packed_sequence")
_SLIDING = ("sliding_window_overlay", "causal_mask_function")
_CHUNKED = ("chunked_overlay", "causal_mask_function")
_IN_BLOCKS, _IN_BLOCKS_AND_WINDOW = "blockwise_overlay", ("or_masks", "sliding_window_overlay")


@dataclass(frozen=True)
class Pattern:
    """A causal mask.

    Attributes:
        window: keys that a query sees; chunks begin with the first token of a row. None: all before it.
        documents: [B, T] int64, the number of the document that each token of a packed row belongs to; None: one.
        blocks: [B, T] int64: tokens of one number, but -1, attend to each other both ways; None: never.
        cuts_blocks: whether the window holds inside blocks too.
    """

    window: Window | None = None
    documents: Tensor | None = None
    blocks: Tensor | None = None
    cuts_blocks: bool = False


def read_pattern(mask_function: Callable[..., Any]) -> Pattern | None:
    """What a mask function of transformers allows; None: something that is not known."""
    name, held = _parts(mask_function)
    if name == "causal_mask_function":
        return Pattern()
    if name not in ("and_masks", "or_masks"):
        return None
    parts = [_parts(part) for part in held["mask_functions"]]
    names = tuple(part for part, _ in parts)
    inner = read_pattern(held["mask_functions"][0])
    if name == "or_masks":
        if inner is None or len(names) != 2 or names[1] != _IN_BLOCKS or inner.documents is not None:
            return None
        if isinstance(inner.window, Chunked):
            return None
        return replace(inner, blocks=parts[1][1]["block_sequence_ids"])
    if names == _IN_BLOCKS_AND_WINDOW and inner is not None and inner.window is None:
        return replace(inner, window=parts[1][1]["sliding_window"], cuts_blocks=True)
    if names == _SLIDING:
        return Pattern(window=parts[0][1]["sliding_window"])
    if names == _CHUNKED:
        return Pattern(window=Chunked(parts[0][1]["chunk_size"]))
    if names == _PACKED:
        inner = read_pattern(parts[1][1]["mask_function"])
        return None if inner is None else replace(inner, documents=parts[0][1]["packed_sequence_mask"])
    return None


def names_of(mask_function: Callable[..., Any]) -> Iterator[str]:
    """Names of the functions that a mask function is put together from."""
    name, held = _parts(mask_function)
    inner = held.get("mask_functions", ()) if name in ("and_masks", "or_masks") else ()
    if not inner:
        yield name
    for part in inner:
        yield from names_of(part)


def _parts(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """The name of the function, or of the one that made it, and what it holds; a foreign one gives its full name."""
    name = getattr(function, "__qualname__", repr(function)).split(".<locals>")[0]
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return f"{getattr(function, '__module__', '?')}.{name}", {}
    names = function.__code__.co_freevars
    return name, dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))


class LazyMask(Tensor):
    """The mask [B, 1, n, S] that `eager` attention is given, made only where somebody computes with it.

    d2o attention needs no such tensor: it asks for the padding and the pattern. Layers that do not use the attention
    interface, and models that change their masks, find what they would find with `eager`.

    Attributes:
        padding: 2D [B, T] bool, False marks padding; None: no padding.
        pattern: of a mask that is made causal, or both ways in blocks; None: of another.
        cache: that the forward was given, if it has a method `begin_forward`; else None.
        may_be_changed: whether it was written to, or a view of it was taken, through which it may have been.
        whole: the mask that this one is of the last queries of, or this one itself.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, arguments: dict[str, Any], made: dict[str, Tensor], cache: Any = None) -> LazyMask:
        """arguments: what a mask function of transformers is called with; made: masks there are, by their attention."""
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        dtype, device = arguments.get("dtype", torch.float32), arguments.get("device", "cpu")
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.padding = arguments.get("attention_mask")
        mask.pattern, mask.cache = read_pattern(arguments["mask_function"]), cache
        mask.may_be_changed, mask._arguments, mask._made, mask._first = False, arguments, made, None
        return mask

    @property
    def whole(self) -> LazyMask:
        """See the class."""
        return self if self._first is None else self._first.whole

    def _of_last(self, count: int) -> LazyMask:
        """The mask of the last `count` queries: what it would be, if it were a tensor, a view of this one."""
        given = self._arguments
        skipped = self.shape[2] - count
        made = LazyMask({**given, "q_length": count, "q_offset": given.get("q_offset", 0) + skipped}, {}, self.cache)
        made.may_be_changed, made._first = self.may_be_changed, self
        return made

    def _may_change(self) -> None:
        """It is written to, or a view of it is taken; what it is a view of, too."""
        self.may_be_changed = True
        if self._first is not None:
            self._first._may_change()

    def __repr__(self) -> str:
        return f"LazyMask({tuple(self.shape)}, {self.pattern})"

    @property
    def blocks(self) -> Tensor | None:
        """[B, n] on the host, of the queries: tokens of one number attend to each other both ways; None: none do.

        Raises:
            ValueError: a block longer than a window that does not hold in it.
        """
        if "blocks" not in self._made:
            first = int(self._arguments.get("q_offset", 0))
            found = self.pattern.blocks[:, first : first + self.shape[2]].cpu()
            self._made["blocks"] = found if self.shape[2] > 1 and bool((found >= 0).any()) else None
        found, window = self._made["blocks"], self.pattern.window
        if found is not None and window is not None and not self.pattern.cuts_blocks:
            longest = max(int(row[row >= 0].bincount().max()) for row in found if bool((row >= 0).any()))
            if longest > window:
                raise ValueError(
                    f"{longest} tokens attend to each other both ways, beyond the sliding window ({window}) of other "
                    "layers: a D2OCache does not support that. Read less at once"
                )
        return found

    @property
    def names(self) -> str:
        """The functions of the model that the mask is put together from."""
        return ", ".join(names_of(self._arguments["mask_function"]))

    def of(self, attention: str) -> Tensor | None:
        """The mask that transformers makes for this attention: "sdpa" [B, 1, n, S] bool, or None where `is_causal` or
        nothing will do; "eager" [B, 1, n, S] in the dtype of the model, to be added to logits."""
        attention = "eager" if self.may_be_changed else attention
        if attention not in self._made and attention == "eager" and self._first is not None:
            self._made[attention] = self._first.of(attention)[:, :, -self.shape[2] :]
        if attention not in self._made:
            make = {"sdpa": masking_utils.sdpa_mask, "eager": masking_utils.eager_mask}[attention]
            self._made[attention] = make(**self._arguments)
        return self._made[attention]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments, results = func._schema.arguments, func._schema.returns
        shared = any(one.alias_info is not None for one in (*arguments, *results))

        def made(mask: LazyMask) -> Tensor:
            tensor = mask.of("eager")
            if shared:
                mask._may_change()
            return tensor

        if (count := _last_queries(func, args)) is not None:
            return args[0]._of_last(count)

        args, kwargs = tree_map_only(LazyMask, made, (args, kwargs or {}))
        return func(*args, **kwargs)


def _last_queries(func: Any, args: tuple[Any, ...]) -> int | None:
    """Of how many of its last queries an operator takes a mask that is its first argument; None: it does something
    else."""
    if not isinstance(args[0], LazyMask):
        return None
    if func is torch.ops.aten.alias.default:
        return args[0].shape[2]
    if func is not torch.ops.aten.slice.Tensor:
        return None
    mask, dim, start, stop, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
    length = mask.shape[dim]
    start, stop = ((length if at is None else at) if number else at or 0 for number, at in enumerate((start, stop)))
    start, stop = (max(0, at + length) if at < 0 else min(at, length) for at in (start, stop))
    if step != 1 or stop < length or start == length or (start and dim not in (2, -2)):
        return None
    return mask.shape[2] - start


class Width(int):
    """A number of keys, with the cache that said it: the first that a cache hears of a forward's padding.

    Attributes:
        cache: has a method `begin_forward`.
    """

    cache: Any = None


@torch.compiler.disable
def make_mask(**arguments: Any) -> Tensor | None:
    """The mask function that transformers calls: a `LazyMask`, or None where `eager` attention gets none.

    Raises:
        ValueError: a causal mask over a cache of static size, whose keys end in slots that are not filled yet.
    """
    arguments.setdefault("mask_function", masking_utils.causal_mask_function)
    made = {}
    cache = getattr(arguments["kv_length"], "cache", None)
    if cache is not None:
        arguments["kv_length"] = int(arguments["kv_length"])
        cache.begin_forward(arguments["batch_size"], arguments["q_length"], arguments.get("attention_mask"))
    if arguments.get("allow_is_bidirectional_skip"):
        made["sdpa"] = masking_utils.sdpa_mask(**arguments)
        if made["sdpa"] is None:
            return None
    # A causal query sees no key after itself, so a model has none to offer; of an encoder it may have any number.
    keys = arguments["kv_length"] + arguments.get("kv_offset", 0)
    seen = int(arguments.get("q_offset", 0)) + arguments["q_length"]
    if keys > seen and "causal_mask_function" in names_of(arguments["mask_function"]):
        raise ValueError(
            f"the cache hands out {keys} keys, but only {seen} tokens were seen: caches of static size are not "
            "supported by d2o attention; use D2OCache or DynamicCache"
        )
    return LazyMask(arguments, made, cache)
