"""Prompts read once, from which every method goes its own way; or, where ranks share them, once for every method.

Shape legend: B rows, T prompt columns, n columns of a later turn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2o_dist.comm import ParallelMesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.reading import read
from d2o_dist.engine.session import RowUsage, Session, left_pad
from d2o_dist.eval.gathering import gathering_config, group_by_queries, second_reading
from d2o_dist.models.cache import ModelCache
from d2o_dist.models.loading import adapt
from d2o_dist.policy.config import D2OConfig

TokenRows = Sequence[Sequence[int]]


class Reading:
    """A batch of prompts in an uncompressed cache, with the statistics that the methods will need.

    The prompts are read a second time if one of the methods ranks by that.

    Args:
        prompts: token ids of each row; pad_id: fills the shorter ones.
        configs: the methods that will start from here.
        chunk: prompt tokens of one forward; None: all at once.
        all_logits: keep the logits of all columns; for prompts that are read at once.

    Attributes:
        logits: of the last column, [B, V]; with `all_logits` [B, T, V].
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        prompts: TokenRows,
        configs: Sequence[D2OConfig],
        *,
        pad_id: int,
        chunk: int | None = None,
        all_logits: bool = False,
    ) -> None:
        if all_logits and chunk is not None:
            raise ValueError(f"all_logits needs prompts read at once, not in chunks of {chunk}")
        self.model, self._prompts, self._pad_id, self._chunk = adapt(model), prompts, pad_id, chunk
        ids, mask = left_pad(prompts, pad_id)
        # One prefill for all methods, or, where they take column sums from different queries, one for each such group.
        self._caches = {}
        for group in group_by_queries(configs):
            cache = self.model.make_cache(gathering_config(group))
            self._caches[cache.d2o.query_sample] = cache
            logits = read(self.model, cache, ids, mask, chunk, all_logits=all_logits)
            reread_chunk = second_reading(group)
            if reread_chunk is not None:
                device = self.model.device
                cache.read_again(self.model.forward, ids.to(device), mask.to(device), chunk=reread_chunk)
        self.logits = logits

    @property
    def cache(self) -> ModelCache:
        """The uncompressed prompts; of several, those that methods without column sums start from."""
        return next(iter(self._caches.values()))

    def start(self, config: D2OConfig, questions: TokenRows | None = None, reading: str = "whole") -> MethodSession:
        """A session of one method; with `questions`, they are read after the compression.

        With another `reading` than `whole` it reads the prompts anew: they are compressed meanwhile.
        """
        if reading != "whole":
            return OwnSession(self.model, config, self._prompts, questions, self._pad_id, self._chunk, reading=reading)
        cache = self._caches[config.query_sample] if config.needs_column_sums else self.cache
        return ReadSession(self.model, cache.with_config(config), self.logits, questions, self._pad_id)


class SeparateReading:
    """A batch of prompts that every method reads anew: because several ranks share it, or no method reads it whole.

    Args:
        prompts, pad_id, chunk: as for `Reading`; mesh, parallel: as for `Session`.
    """

    def __init__(
        self,
        model: Any,
        prompts: TokenRows,
        *,
        pad_id: int,
        chunk: int | None,
        mesh: ParallelMesh,
        parallel: ParallelConfig,
    ) -> None:
        self.model, self._prompts, self._pad_id, self._chunk = model, prompts, pad_id, chunk
        self._mesh, self._parallel = mesh, parallel

    def start(self, config: D2OConfig, questions: TokenRows | None = None, reading: str = "whole") -> MethodSession:
        """As `Reading.start`. Every rank of the request calls it."""
        if reading == "whole" and config.knows_budgets:
            reading = "auto"  # what is kept is that of `whole`, for records that do not depend on the mesh
        return OwnSession(
            self.model, config, self._prompts, questions, self._pad_id, self._chunk, self._mesh, self._parallel, reading
        )


class MethodSession(Session):
    """A session that knows its prompts: what its `prefill` is given says nothing new, and is not used.

    Attributes:
        compressed: what the cache held for each row right after the compression; None before.
    """

    compressed: list[RowUsage] | None = None

    def _note_compressed(self, num_rows: int) -> None:
        self.compressed = [self.row_usage(row) for row in range(num_rows)]

    @torch.inference_mode()
    def read(self, rows: TokenRows, *, all_logits: bool = False) -> Tensor:
        """A later turn: logits [B, V] of its last column (padded on the left), or [B, n, V] of all."""
        ids, mask = left_pad(rows, self._pad_id)
        return read(self.model, self.cache, ids, mask, all_logits=all_logits)


class ReadSession(MethodSession):
    """One whose prompts were read already: its prefill compresses, and reads hidden questions."""

    def __init__(self, model: Any, cache: ModelCache, logits: Tensor, questions: TokenRows | None, pad_id: int) -> None:
        super().__init__(model, cache.d2o)
        self.cache = cache
        self._logits, self._questions, self._pad_id = logits, questions, pad_id

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor, chunk: int | None = None) -> Tensor:
        """Next-token logits [B, V] of the prompts that were read, or of the questions after them."""
        self.cache.finalize()
        self._note_compressed(len(self.cache.compressed.num_seen))
        return self._logits if self._questions is None else self.read(self._questions)


class OwnSession(MethodSession):
    """One that reads its own prompts, and then hidden questions.

    Args:
        reading: of the prompts; the others as for `SeparateReading`.
    """

    def __init__(
        self, model: Any, config: D2OConfig, prompts: TokenRows, questions: TokenRows | None, pad_id: int,
        chunk: int | None, mesh: ParallelMesh | None = None, parallel: ParallelConfig | None = None,
        reading: str = "whole",
    ) -> None:  # fmt: skip
        super().__init__(model, config, mesh, parallel, reading=reading)
        self._prompts, self._questions, self._pad_id, self._chunk = prompts, questions, pad_id, chunk

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor, chunk: int | None = None) -> Tensor:
        """Next-token logits [B, V] of the prompts, or of the questions after them."""
        logits = super().prefill(*left_pad(self._prompts, self._pad_id), self._chunk)
        self._note_compressed(len(self._prompts))
        if self._questions is None:
            return logits
        ids, mask = left_pad(self._questions, self._pad_id)
        return self.decode(ids[:, 0].tolist()) if ids.shape[1] == 1 else super().prefill(ids, mask)
