"""The columns of a batch that a cache has seen: which of them are tokens, and whether a forward agrees with that.

Shape legend: B rows, n columns of a forward.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from d2o_dist.slots.rows import Rows

_READ_AGAIN = (
    "the forward reads again what the cache holds. Is use_cache False, in the call or in the model's configuration? It "
    "must be True. Another text needs a new cache"
)
_COUNTS_PADDING = (
    "the row has padding, which must be counted in all forwards or in none. Pass the attention_mask of the whole text, "
    "with zeros in padding, and position_ids that count its ones"
)


class Columns:
    """What masks and position ids of later forwards are held against. All of it lies on the host.

    Args:
        batch: B.

    Attributes:
        count: columns seen, padding included.
    """

    def __init__(self, batch: int) -> None:
        self.count = 0
        # Of each row a byte per column: 1 where the column is a token of the row.
        self._tokens = [bytearray() for _ in range(batch)]
        # The position that follows each row's last token.
        self._next = [0] * batch

    def mask_with(self, new: Tensor) -> Tensor:
        """[B, n] of new columns -> [B, seen + n]: the mask that a forward of them is given."""
        old = [torch.tensor(list(row), dtype=new.dtype, device=new.device) for row in self._tokens]
        return torch.cat([torch.stack(old), new], 1) if old else new

    def check_mask(self, mask: Tensor | None, length: int, left_out: Collection[int] = ()) -> None:
        """Refuse a mask that contradicts what was seen.

        Args:
            mask: [B, seen + length]; None says nothing. left_out: rows that it need not agree about.

        Raises:
            ValueError: another shape; a seen token that would be padding, or seen padding that would be a token.
        """
        if mask is None:
            return
        batch, width = mask.shape
        if (batch, width) != (len(self._tokens), self.count + length):
            raise ValueError(
                f"attention_mask has {batch} rows of {width} columns, but the batch has {len(self._tokens)} rows, of "
                f"which {self.count} columns were seen and {length} are new: "
                + (_READ_AGAIN if self.count and width == length else "pass the mask of the whole text")
            )
        host = mask[:, : self.count].bool().cpu()
        for row, tokens in enumerate(self._tokens):
            said = host[row].numpy().tobytes()
            if said == tokens or row in left_out:
                continue
            wrong = [column for column, (one, other) in enumerate(zip(said, tokens, strict=True)) if one != other]
            what = f"in {len(wrong)} columns of row {row}, the first of them {wrong[0]}"
            if tokens[wrong[0]]:
                raise ValueError(
                    f"attention_mask says padding {what}, but the cache took in tokens there and cannot take back what "
                    "they changed. generate feeds padding to rows that have ended: give it stopping_criteria="
                    "[cache.ended_rows(eos_token_id, pad_token_id)], or read the text into a new cache"
                )
            raise ValueError(
                f"attention_mask says tokens {what}, but the cache saw padding there: pass the mask with zeros in "
                "padding, or read the text into a new cache"
            )

    def check_positions(
        self, positions: Tensor | None, rows: Rows, left_out: Collection[int] = ()
    ) -> list[int] | None:
        """Refuse position ids that contradict what was seen; the position of each row's last token.

        Args:
            positions: [1 or B, n]; None, or of more dimensions, they say nothing. rows: the tokens; left_out: as for
                `check_mask`.

        Raises:
            ValueError: they go back, or, in a row with padding, leave some out.
        """
        if positions is None or positions.dim() != 2:
            return None
        columns = [[0, rows.length - 1]] * rows.batch
        if rows.index is not None:
            columns = [[int(one[0]), int(one[-1])] if len(one) else [0, 0] for one in rows.index]
        index = torch.tensor(columns, device=positions.device)
        ends = positions.expand(rows.batch, -1).gather(1, index).tolist()
        for row, (first, _) in enumerate(ends):
            follows = self._next[row]
            if not rows.counts[row] or row in left_out:
                continue
            # A row without a token before this one may begin anywhere.
            if not follows or first == follows or (first > follows and 0 not in self._tokens[row]):
                continue
            raise ValueError(
                f"position ids of row {row} begin at {first}, but the cache has seen those up to {follows - 1}: "
                + (_COUNTS_PADDING if first and 0 in self._tokens[row] else _READ_AGAIN)
            )
        return [last for _, last in ends]

    def add(self, rows: Rows, last: Sequence[int] | None = None) -> None:
        """The columns of a forward, with the positions of each row's last token, if they are known."""
        for row, count in enumerate(rows.counts):
            here = torch.zeros(rows.length, dtype=torch.bool)
            here[slice(None) if rows.index is None else rows.index[row]] = True
            self._tokens[row] += here.numpy().tobytes()
            if count:
                self._next[row] = self._next[row] + count if last is None else last[row] + 1
        self.count += rows.length

    def join(self, other: Columns) -> None:
        """The rows of another batch too. Each begins with its first token, and is padded on the left: in a batch that
        rows join and leave for long, columns of those that left would gather."""
        rows = [row[row.find(1) :] for row in (*self._tokens, *other._tokens)]
        self.count = max(map(len, rows))
        self._tokens = [bytearray(self.count - len(row)) + row for row in rows]
        self._next += other._next

    def select_rows(self, rows: Sequence[int]) -> None:
        """Rows in this order, repeated where repeated."""
        self._tokens = [bytearray(self._tokens[row]) for row in rows]
        self._next = [self._next[row] for row in rows]
