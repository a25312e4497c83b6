"""The order in which the layers of a model attend, and which of them attend to keys of others.

In statistics, the attention that a layer's slots receive is the mean of its own and of that of the layers that look at
them: of one model or another, every query gives 1 in all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """First the layers that have keys of their own, then those that attend to the keys of one of these.

    Attributes:
        count: layers with keys of their own, numbered from 0; others follow.
        looks: of each of the others, whose keys it attends to.
        reads_prompts: whether all columns of a prompt go through the others. Else only those go whose logits are asked
            for, which are not counted: what is kept does not depend on who asks for logits, nor on chunks.
    """

    count: int
    looks: tuple[int, ...] = ()
    reads_prompts: bool = True

    def owner(self, layer: int) -> int:
        """Whose keys a layer attends to."""
        return layer if layer < self.count else self.looks[layer - self.count]

    def place(self, layer: int) -> int:
        """Which of the layers that attend to its owner's keys it is; the owner is 0."""
        return 0 if layer < self.count else 1 + self.looks[: layer - self.count].count(self.owner(layer))

    def sharing(self, owner: int) -> tuple[int, int]:
        """How many layers attend to the keys of `owner`, itself included; and how many of them count in prompts."""
        layers = 1 + self.looks.count(owner)
        return layers, layers if self.reads_prompts else 1

    def is_last(self, layer: int) -> bool:
        """Whether the forward ends with this layer."""
        return layer + 1 == self.count + len(self.looks)

    def done_after(self, layer: int) -> int | None:
        """The layer whose keys no other layer will attend to once this one has; None: others will."""
        owner = self.owner(layer)
        return None if owner in self.looks[max(0, layer + 1 - self.count) :] else owner
