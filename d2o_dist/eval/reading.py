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
from d2o_dist.engine.session import RowUsage, Session, chunk_ends, left_pad
from d2o_dist.eval.gathering import gathering_config, group_by_queries, second_reading
from d2o_dist.integrations.hf import D2OCache
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
        self.model, self._pad_id = model, pad_id
        ids, mask = left_pad(prompts, pad_id)
        # One prefill for all methods, or, where they take column sums from different queries, one for each such group.
        self._caches = {}
        for group in group_by_queries(configs):
            cache = D2OCache(config=model.config, d2o=gathering_config(group))
            self._caches[cache.d2o.query_sample] = cache
            start = 0
            for end in chunk_ends(ids.shape[1], chunk):
                logits = _forward(model, cache, ids[:, start:end], mask[:, start:end], all_logits=all_logits)
                start = end
            reread_chunk = second_reading(group)
            if reread_chunk is not None:
                cache.reread(model, ids.to(model.device), mask.to(model.device), chunk=reread_chunk)
        self.logits = logits if all_logits else logits[:, -1]

    @property
    def cache(self) -> D2OCache:
        """The uncompressed prompts; of several, those that methods without column sums start from."""
        return next(iter(self._caches.values()))

    def start(self, config: D2OConfig, questions: TokenRows | None = None) -> ReadSession:
        """A session of one method; with `questions`, they are read after the compression."""
        cache = self._caches[config.query_sample] if config.needs_column_sums else self.cache
        return ReadSession(self.model, cache.with_config(config), self.logits, questions, self._pad_id)


class ReadSession(Session):
    """A session whose prompts were read already: its prefill compresses, and reads hidden questions.

    Attributes:
        compressed: what the cache held for each row right after the compression; None before.
    """

    def __init__(self, model: Any, cache: D2OCache, logits: Tensor, questions: TokenRows | None, pad_id: int) -> None:
        super().__init__(model, cache.d2o)
        self.cache = cache
        self.compressed: list[RowUsage] | None = None
        self._logits, self._questions, self._pad_id = logits, questions, pad_id

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor, chunk: int | None = None) -> Tensor:
        """Next-token logits [B, V] of the prompts that were read; the arguments say nothing new and are not used."""
        self.cache.finalize()
        self.compressed = [self.row_usage(row) for row in range(len(self.cache.compressed.num_seen))]
        if self._questions is None:
            return self._logits
        return self.read(self._questions)[:, -1]

    @torch.inference_mode()
    def read(self, rows: TokenRows, *, all_logits: bool = False) -> Tensor:
        """A later turn: logits [B, n, V] of its columns (padded on the left), or [B, 1, V] of the last one."""
        ids, mask = left_pad(rows, self._pad_id)
        return _forward(self.model, self.cache, ids, mask, all_logits=all_logits)


class SharedReading:
    """A batch of prompts that several ranks share: every method reads them anew.

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

    def start(self, config: D2OConfig, questions: TokenRows | None = None) -> SharedSession:
        """As `Reading.start`. Every rank of the request calls it."""
        return SharedSession(self, config, questions)


class SharedSession(Session):
    """A session that reads its own prompts, whatever its prefill is given, and then hidden questions.

    Attributes:
        compressed: as of `ReadSession`.
    """

    def __init__(self, reading: SharedReading, config: D2OConfig, questions: TokenRows | None) -> None:
        super().__init__(reading.model, config, reading._mesh, reading._parallel)
        self.compressed: list[RowUsage] | None = None
        self._reading, self._questions = reading, questions

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor, chunk: int | None = None) -> Tensor:
        """Next-token logits [B, V] of the prompts, or of the questions after them; the arguments are not used."""
        prompts, pad_id = self._reading._prompts, self._reading._pad_id
        logits = super().prefill(*left_pad(prompts, pad_id), self._reading._chunk)
        self.compressed = [self.row_usage(row) for row in range(len(prompts))]
        if self._questions is None:
            return logits
        ids, mask = left_pad(self._questions, pad_id)
        return self.decode(ids[:, 0].tolist()) if ids.shape[1] == 1 else super().prefill(ids, mask)


def _forward(model: Any, cache: D2OCache, ids: Tensor, mask: Tensor, *, all_logits: bool = False) -> Tensor:
    """One forward of the columns ids, mask [B, n] on top of what the cache has seen."""
    device = model.device
    seen = torch.tensor(cache.compressed.num_seen or [0] * ids.shape[0])[:, None]
    positions = (seen + mask.cumsum(-1) - 1).clamp(min=0)
    padding = None if bool(mask.all()) else cache.compressed.columns.mask_with(mask).to(device)
    return model(
        input_ids=ids.to(device), attention_mask=padding, position_ids=positions.to(device), past_key_values=cache,
        use_cache=True, logits_to_keep=0 if all_logits else 1,
    ).logits  # fmt: skip
