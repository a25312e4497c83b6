"""`score_queries: strided` of the naive oracle: column sums from some of the queries, section 3."""

from __future__ import annotations

from typing import Any

import torch


class OracleSampling:
    """What `OracleCache` adds to column sums where not every query is looked at."""

    config: Any
    slots: list[list[list[Any]]]
    num_layers: int
    num_heads: int
    group_size: int

    def _sampled_rows(self, layer: int, h: int, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """`score_queries: strided`: what is added for the attention rows [slots] of a chunk's tokens in query head h.

        Token i of the prefill (from 0): its attention on tokens of the same prefill less than `score_near_distance`
        away counts once; the rest of its row counts `stride` times if i + 1 is a multiple of the stride, else it waits.
        """
        config = self.config
        if self.num_old[layer][h] is None:
            self.num_old[layer][h] = len(rows[0]) - len(rows)
        added = []
        for i, row in enumerate(rows, start=self.num_prefilled):
            token = torch.arange(len(row)) - self.num_old[layer][h]  # below 0: from before this prefill
            near = (token >= 0) & (i - token < config.score_near_distance)
            added.append(torch.where(near, row, 0.0))
            far = torch.where(near, 0.0, row)
            if (i + 1) % config.score_query_stride == 0:
                added.append(far * config.score_query_stride)
                self.waiting[layer][h] = []
            else:
                self.waiting[layer][h].append(far)
        return added

    def _add_waiting(self) -> None:
        """The prefill has ended: tokens that no sampled one stands for count once."""
        for layer, heads in enumerate(self.waiting):
            for h, rows in enumerate(heads):
                for row in rows:  # an earlier chunk's row lacks the later slots
                    wide = torch.zeros(len(self.slots[layer][h // self.group_size]), dtype=torch.float64)
                    wide[: len(row)] = row
                    self._add_column_sums(layer, h, wide)
        self._begin_sampling()

    def _begin_sampling(self) -> None:
        """With `score_queries: strided`: per layer and query head the slots when this prefill began; tokens since then;
        and the far parts of the attention rows [slots] of the tokens since the last sampled one."""
        self.num_old: list[list[int | None]] = [[None] * self.num_heads for _ in range(self.num_layers)]
        self.num_prefilled = 0
        self.waiting: list[list[list[torch.Tensor]]] = [
            [[] for _ in range(self.num_heads)] for _ in range(self.num_layers)
        ]
