"""A cache of a model some of whose layers keep a state of the text, beside those that attend or in them.

Shape legend: B rows, n columns of a forward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor

from d2o_dist.models.cache import ModelCache
from d2o_dist.models.hf.states import States, check_padding
from d2o_dist.slots.step import DecodeStep


class StatefulCache(ModelCache):
    """A `ModelCache`, and the states of the layers that have some: what happens to rows happens to both.

    Args:
        counts: per layer of the model how many states it keeps; 0: none.
        resumes: whether the model's layers go on with their states in a forward of more than one token.
        others: those of `ModelCache`.
    """

    def __init__(self, counts: Sequence[int], *others: Any, resumes: bool = True, **named: Any) -> None:
        super().__init__(*others, **named)
        self.states, self._resumes = States(counts), resumes
        # Whether states were settled for the next forward, and whether the forwards are a second reading.
        self._begun = self._reads_again = False

    @abstractmethod
    def check_batch(self, batch: int) -> None:
        """Refuse a forward of another number of rows than the cache has."""

    @property
    def state_bytes(self) -> int:
        """Of this rank: what layers of linear attention, Mamba and convolution keep."""
        return self.states.num_bytes

    # ---- called by the model -------------------------------------------------------------------------------------

    def begin_forward(self, batch: int, length: int, mask: Tensor | None) -> None:
        """Called when the model makes its masks, before any layer: settle what becomes of states of padded rows.

        Args:
            length: n columns; mask: [B, seen + n] bool, False marks padding; None: no padding.

        Raises:
            ValueError: another batch size than the cache has; padding after a row's tokens; a chunk after others, of a
                model that does not resume.
        """
        self._begun, seen = True, self.compressed.num_seen
        if not self.states or self._reads_again or self.compressed.step_announced:
            return
        self.states.put_back()
        self.check_batch(batch)
        if length == 1 and self.compressed.num_seen_columns:
            padded = set() if mask is None else set((~mask[:, -1]).nonzero().flatten().tolist())
            self.states.keep(sorted(padded | self.compressed.left_out))
            return
        self._check_resumes()
        if mask is not None:
            check_padding(mask[:, -length:], seen)

    def _check_resumes(self) -> None:
        if not self._resumes and self.compressed.num_seen_columns:
            raise ValueError(
                "this model's Mamba layers forget what was read where more than one token follows, in transformers: "
                "read a prompt in one forward, without chunks, and a later turn with the whole text into a new cache"
            )

    def check_begun(self) -> None:
        """Refuse a forward that `begin_forward` was not told of: the model makes its masks itself, or was given one."""
        if not (self._begun or self._reads_again or self.compressed.step_announced):
            raise ValueError(
                "the model's masks are not made by transformers, so that rows with padding are not known before layers "
                "that keep a state, nor the cache where latents are expanded: leave the attention mask 2D"
            )
        self._begun = False

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """See transformers."""
        return self.states.get_conv_state(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """See transformers."""
        return self.states.update_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """See transformers."""
        return self.states.get_recurrent_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """See transformers."""
        return self.states.update_recurrent_state(*args, **kwargs)

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """See transformers."""
        return self.states.has_previous_state(*args, **kwargs)

    # ---- decode steps that are announced ---------------------------------------------------------------------------

    @property
    def takes_padding(self) -> bool:
        """See `ModelCache`: rows of padding would have states."""
        return not self.states

    def begin_step(self, present: Sequence[bool] | None = None, padding: int = 0) -> DecodeStep:
        """See `ModelCache`."""
        assert not padding or self.takes_padding
        step = super().begin_step(present, padding)
        self.states.put_back()
        self.states.keep([row for row, here in enumerate(present or ()) if not here])
        return step

    def end_step(self) -> None:
        """See `ModelCache`."""
        super().end_step()
        self.states.put_back()

    def abandon_step(self) -> None:
        """See `ModelCache`."""
        super().abandon_step()
        self.states.put_back()

    # ---- prompts and rows ----------------------------------------------------------------------------------------

    def read_again(
        self, forward: Callable[[Tensor, Tensor, Any], Any], ids: Tensor, mask: Tensor | None = None, *,
        chunk: int | None = None,
    ) -> None:  # fmt: skip
        """See `ModelCache`. Layers that keep a state begin each forward with that of the whole prompt.

        Raises:
            ValueError: also, with such layers, prompts of different lengths.
        """
        if not self.states:
            return super().read_again(forward, ids, mask, chunk=chunk)
        seen = self.compressed.num_seen
        if len(set(seen)) > 1:
            raise ValueError(
                f"prompts of {seen} tokens cannot be read a second time together by a model with layers that keep a "
                "state: read those of one length, or one prompt at a time"
            )

        def kept(*args: Any) -> None:
            self.states.keep(range(len(seen)))
            forward(*args)
            self.states.put_back()

        self._check_resumes()
        self.states.put_back()
        self._reads_again = True
        try:
            super().read_again(kept, ids, mask, chunk=chunk)
        finally:
            self._reads_again = False

    def select_rows(self, rows: Tensor) -> None:
        """See `ModelCache`."""
        super().select_rows(rows)
        self.states.select_rows(rows)

    def join(self, *others: Self) -> None:
        """See `ModelCache`."""
        super().join(*others)
        for other in others:
            self.states.join(other.states)

    def reset(self) -> None:
        """See `ModelCache`."""
        super().reset()
        self.states.reset()
        self._begun = False
