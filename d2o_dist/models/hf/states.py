"""Layers that keep a state and no tokens: linear attention, Mamba, convolutions. transformers' own layers serve them.

Their state is of the whole text up to now. What other layers do with rows (leave some out of a step, keep some, take in
others) is done to it here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, LinearAttentionLayer


class StateLayer(LinearAttentionLayer):
    """transformers' own layer. What is made in `torch.inference_mode` can be written outside of it."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """See transformers."""
        with torch.inference_mode(False):
            super().lazy_initialization(*args, **kwargs)

    def reset(self) -> None:
        """Forget everything, the size of the batch too."""
        self.__init__(self.number_of_states)

    @property
    def held(self) -> Iterator[tuple[dict[int, Any], int]]:
        """Where each tensor of the state is, [B, ...]: a mapping, and its key there."""
        for states in (self.conv_states, self.recurrent_states):
            yield from ((states, key) for key, state in states.items() if state is not None)


class States(Cache):
    """The states of one batch, under the names that models ask a cache for.

    Args:
        counts: per layer of the model how many states it keeps; 0: none.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__(layers=[StateLayer(count) if count else DummyLayer() for count in counts])
        self._kept: tuple[Tensor, list[Tensor]] | None = None

    def __bool__(self) -> bool:
        """Whether the model has such layers."""
        return any(self.is_linear)

    def _places(self) -> list[tuple[dict[int, Any], int]]:
        return [place for layer in self.layers if isinstance(layer, StateLayer) for place in layer.held]

    @property
    def num_bytes(self) -> int:
        """Of the states on this rank."""
        return sum(states[key].nbytes for states, key in self._places())

    def keep(self, rows: Sequence[int]) -> None:
        """Let the next forward change nothing in these rows, once `put_back` is called."""
        index = torch.tensor(list(rows))
        with torch.inference_mode(False), torch.no_grad():
            self._kept = (index, [_rows(states[key], index) for states, key in self._places()]) if len(index) else None

    def put_back(self) -> None:
        """The rows that were to be kept are what they were."""
        kept, self._kept = self._kept, None
        if kept is not None:
            index, before = kept
            with torch.no_grad():
                for (states, key), old in zip(self._places(), before, strict=True):
                    states[key].index_copy_(0, index.to(old.device), old)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        self.put_back()
        with torch.inference_mode(False), torch.no_grad():
            for states, key in self._places():
                states[key] = _rows(states[key], index)

    def join(self, other: States) -> None:
        """The rows of another batch too, after those that are here."""
        self.put_back()
        other.put_back()
        with torch.inference_mode(False), torch.no_grad():
            for (mine, key), (theirs, _) in zip(self._places(), other._places(), strict=True):
                mine[key] = torch.cat([mine[key], theirs[key]])

    def reset(self) -> None:
        """Forget everything."""
        self._kept = None
        super().reset()


def check_padding(mask: Tensor, seen: Sequence[int]) -> None:
    """Refuse a chunk with padding after tokens: layers that keep a state would take it into theirs.

    Args:
        mask: [B, n] bool, False marks padding; seen: tokens of each row before it; empty: none.

    Raises:
        ValueError: names the row.
    """
    before = torch.tensor(list(seen) or [0] * len(mask), device=mask.device)[:, None]
    wrong = (~mask & (before + mask.long().cumsum(1) > 0)).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"row {wrong[0]} has padding after its tokens, which layers of linear attention, Mamba or convolution "
            "would take in: pad on the left of the first prompt only, and read later turns of one length, or one row "
            "at a time"
        )


def _rows(state: Tensor, index: Tensor) -> Tensor:
    return state.index_select(0, index.to(state.device))
