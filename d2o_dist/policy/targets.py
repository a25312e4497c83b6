"""Target rules: which kept slots take evicted tokens in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2o_dist.fields.declare import integer, real
from d2o_dist.policy.rule import Rule, registry


@dataclass(frozen=True)
class TargetRule(Rule):
    """Which kept slots take evicted tokens in."""

    path: ClassVar[str] = "merge.targets"

    def tail_sizes(self, num_slots: Tensor, *, finalize: bool) -> Tensor | None:
        """How many of the lowest ranked kept slots of a layer of `num_slots` slots are targets: int64, any shape.

        None: all kept slots are.

        Args:
            finalize: at the end of a prompt rather than while decoding.
        """
        return None

    def before_trim(self, spare: float) -> TargetRule:
        """The rule where a layer is evicted once more before the prompt ends.

        Args:
            spare: share of its slots that are expected to go then, all of them heavy.
        """
        return self


@dataclass(frozen=True)
class Kept(TargetRule):
    """All kept slots; the sinks not, where a merge keeps mass."""

    name: ClassVar[str] = "kept"


@dataclass(frozen=True)
class Tail(TargetRule):
    """Only the lowest ranked of those that are neither sinks nor recent: they become a few summary slots.

    Attributes:
        fraction: share of a layer's slots that is the tail; at least one slot.
        most_while_decoding: most slots of a KV head's tail in an eviction while decoding, so that what ranks send then,
            and what is searched, do not grow with the budget; None: no bound.
    """

    name: ClassVar[str] = "tail"
    fraction: float = real(0.1, above=0, high=1)
    most_while_decoding: int | None = integer(16, low=1, optional=True)

    def tail_sizes(self, num_slots: Tensor, *, finalize: bool) -> Tensor:
        """As `TargetRule.tail_sizes`."""
        sizes = torch.floor(self.fraction * num_slots.double() + 1e-9).long().clamp_min(1)
        bound = None if finalize else self.most_while_decoding
        return sizes if bound is None else sizes.clamp_max(bound)

    def before_trim(self, spare: float) -> Tail:
        """As `TargetRule.before_trim`: what goes then takes in what goes now, and hands it on. What stays is unchanged;
        and what is handed on has been split among many."""
        return dataclasses.replace(self, fraction=max(self.fraction, spare))


TARGETS = registry(Kept, Tail)
