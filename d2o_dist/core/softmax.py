"""How the products of queries and keys become probabilities: the one thing about it that models differ in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Softmax:
    """The softmax of one layer: over softcap * tanh(scale * q . k / softcap) + log_mass of each slot, and over a sink.

    Attributes:
        scale: of the products.
        softcap: bound of the logits, before anything is added to them; None: none.
        sinks: [1, Hq], for each query head at hand the logit of one more key that all queries see, whose value is
            zero. It is in the denominator of all probabilities, once, however many ranks share the slots. None: none.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it has nothing but a scale."""
        return self.softcap is None and self.sinks is None

    def is_same(self, other: Softmax) -> bool:
        """Whether another one is this one: its sinks are the same memory, if there are any."""
        return self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        sinks = self.sinks
        return self.scale, self.softcap, None if sinks is None else (sinks.data_ptr(), sinks.shape, sinks.stride())

    @property
    def logits(self) -> dict[str, Any]:
        """As kernels take what makes logits: the sink is no matter of theirs (`kernels.lse.with_sinks`)."""
        return {"scale": self.scale, "softcap": self.softcap}

    def of_heads(self, pick: Callable[[Tensor], Tensor]) -> Softmax:
        """That of some query heads; pick: takes theirs of [1, Hq]."""
        return self if self.sinks is None else replace(self, sinks=pick(self.sinks))
