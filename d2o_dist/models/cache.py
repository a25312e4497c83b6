"""The cache of one batch of one model, whatever library the model is from.

Shape legend: B rows, n tokens of a chunk, T prompt columns, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.cache.report import CacheReport, make_report
from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.core.autocast import without_autocast
from d2o_dist.core.softmax import Softmax
from d2o_dist.layout.places import Tune
from d2o_dist.models.layer import LayerView
from d2o_dist.models.rules import settle_rules
from d2o_dist.models.shape import BORDER, ModelShape, check_side
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.score import Reread
from d2o_dist.slots.step import DecodeStep
from d2o_dist.slots.windows import kind_of

# Ways in which a cache by itself reads a prompt.
CACHE_READINGS = ("whole", "layerwise")
_WINDOWS = {"chunked": "chunked attention", "sliding": "sliding windows"}


def settle_reading(reading: str, tile_refusal: str | None, d2o: D2OConfig) -> str:
    """When prompts are compressed: `whole`, `layerwise` or `stream`; `auto` is layer by layer where that suits the
    rules, and the model takes tiles.

    Args:
        tile_refusal: of the model; see `ModelAdapter`.

    Raises:
        ValueError: the rules or the model do not allow it.
    """
    if reading == "auto":
        return "layerwise" if d2o.suits_layerwise and tile_refusal is None else "whole"
    d2o.check_reading(reading)
    if reading == "layerwise" and tile_refusal is not None:
        raise ValueError(f"reading (layerwise) needs a model that takes tiles, but {tile_refusal}")
    return reading


class ModelCache:
    """What a model's attention layers and those who run it share: slots, ranks, and what is asked of a prompt.

    Args:
        shape: of the model.
        d2o: how to compress; `D2OConfig()` by default.
        mesh: the ranks that share the request; this process alone by default. With tensor ranks the model must be
            sharded over `mesh.axis("tp")`, and every rank must make the same calls.
        parallel: how they share it; by default as `ParallelConfig` has it, with the sizes of the mesh.
        counter: where the traffic between ranks is counted.
        reading: `whole`: a prompt is compressed before the first decode step, so it may be read in chunks. `layerwise`:
            one forward reads all of it, or of a later turn, and each layer is compressed as soon as it has.

    Attributes:
        compressed: the layers and what they hold.
        layers: a view of each layer with attention.

    Raises:
        ValueError: no layer would be compressed, a budget that this model's layers cannot have, a profile of its layers
            that is missing, heads that the ranks cannot share, or rules that need all layers at once with `layerwise`.
    """

    view_class = LayerView

    def __init__(
        self,
        shape: ModelShape,
        d2o: D2OConfig | None = None,
        mesh: ParallelMesh | None = None,
        parallel: ParallelConfig | None = None,
        counter: TrafficCounter | None = None,
        *,
        reading: str = "whole",
    ) -> None:
        if reading not in CACHE_READINGS:
            raise ValueError(f"reading ({reading!r}) must be one of {', '.join(CACHE_READINGS)}")
        if d2o is not None and not isinstance(d2o, D2OConfig):
            raise ValueError(f"d2o must be a D2OConfig, not {type(d2o).__name__}")
        d2o = d2o or D2OConfig()
        if None not in shape.windows and d2o.keep_ratio != 1:
            kinds = " and ".join(sorted({_WINDOWS[kind_of(window)] for window in shape.windows}))
            raise ValueError(
                f"the model has {kinds} in all of its layers ({len(shape.windows)}), and none of these is "
                "compressed: use the library's own cache, or keep_ratio 1"
            )
        d2o = settle_rules(d2o, shape)
        self.shape = shape
        self.ranks = shape.request_ranks(mesh, parallel, counter)
        self.compressed = CompressedCache(d2o, list(shape.windows), self.ranks, shape.order, shape.latent)
        if reading == "layerwise":
            self.d2o.check_reading(reading)
            self.compressed.reads_layerwise = True
        self.layers = [self.view_class(self.compressed, index) for index in range(len(shape.windows))]
        # Tokens of the longest text that a forward had positions for.
        self._longest = 0
        # Rows of the announced step that are nobody's, after those of the cache.
        self.step_padding = 0

    @property
    def d2o(self) -> D2OConfig:
        """The configuration of the compression."""
        return self.compressed.config

    def __repr__(self) -> str:
        phase, seen = self.compressed.phase, self.compressed.num_seen
        return f"{type(self).__name__}(seen={seen}, phase={phase}, layers={self.layers})"

    def attend_layer(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, mask: Tensor | None,
        positions: Tensor | None = None, blocks: Tensor | None = None, tune: Tune | None = None,
    ) -> Tensor:  # fmt: skip
        """See `CompressedCache.attend`.

        Raises:
            ValueError: also a text that crosses the border of `longrope`.
        """
        border, announced = self.shape.border, self.compressed.step_announced
        if layer == 0 and border is not None and positions is not None and not announced:
            self._check_side(int(positions.max()) + 1)
        padding = self.step_padding if announced else 0
        if padding:
            q, k, v = (tensor[:-padding] for tensor in (q, k, v))
        with torch.no_grad(), without_autocast():
            out = self.compressed.attend(layer, q, k, v, softmax, mask, positions, blocks, tune)
        return pad(out, (0, 0, 0, 0, 0, 0, 0, padding)) if padding else out

    def _check_side(self, length: int) -> None:
        """Of a forward with positions below `length`: it must be on the side of the model's border that all are on."""
        if self.compressed.num_seen_columns:
            check_side(self.shape.border, min(length, self._longest), max(length, self._longest))
        self._longest = max(length, self._longest)

    def with_config(self, d2o: D2OConfig) -> Self:
        """A copy of a cache that has read a prompt and compressed nothing yet, to be compressed as `d2o` says.

        For several configurations on one prompt: what is read under one serves the others, if it gathered what they
        need (`Reach(add_accumulated=True)` gathers everything but a second reading).

        Raises:
            ValueError: the cache was finalized, has seen nothing, or lacks statistics that `d2o` needs.
        """
        copied = copy.deepcopy(self)
        copied.compressed.adopt(settle_rules(d2o, self.shape))
        return copied

    # ---- decode steps that are recorded --------------------------------------------------------------------------

    @property
    def takes_padding(self) -> bool:
        """Whether decode steps may have more rows than the cache."""
        return True

    def begin_step(self, present: Sequence[bool] | None = None, padding: int = 0) -> DecodeStep:
        """Announce a decode step; the model's forward, or a replay of one, and `end_step` must follow.

        See `CompressedCache.begin_step`. A forward without it is a decode step all the same.

        Args:
            padding: rows that the forward has beyond those of the cache, after them. They attend to nothing, and
                nothing of them is kept.
        """
        self.step_padding = padding
        self._check_side(max(self.compressed.num_seen, default=0) + 1)
        return self.compressed.begin_step(present)

    def end_step(self) -> None:
        """After the forward or the replay of an announced step: count its tokens, and evict what is due."""
        self.compressed.end_step()

    def abandon_step(self) -> None:
        """Take back an announced step whose forward was recorded, not run, and broken off."""
        self.compressed.abandon_step()

    # ---- prompts -------------------------------------------------------------------------------------------------

    def deal_tokens(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """This rank's part of a chunk of prompt: (ids, positions) of the forward, which must follow.

        Every rank of the request calls it with the same whole chunk. In the part of a row its tokens are the last
        columns; outputs of the columns before them mean nothing.

        Args:
            ids: [B, n] int64; mask: [B, n] of this chunk alone, 0 marks padding; None: no padding.

        Raises:
            ValueError: a chunk without a token, or of another batch size than the cache's; with sequence ranks, a text
                beyond the border of `longrope`.
        """
        return self._deal(ids, _mask_of(ids, mask), self.compressed.num_seen or [0] * len(ids))

    def deal_tiles(self, ids: Tensor, mask: Tensor, ends: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """As `deal_tokens`, of a forward in tiles that end at these columns of `ids`; also the columns of each here."""
        seen, parts, start = self.compressed.num_seen or [0] * len(ids), [], 0
        for end in ends:
            here = slice(start, end)
            parts.append(self._deal(ids[:, here], mask[:, here], seen, more=start > 0))
            seen = [old + new for old, new in zip(seen, mask[:, here].bool().sum(1).tolist(), strict=True)]
            start = end
        ids, positions = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        return ids, positions, [part.shape[1] for part, _ in parts]

    def _deal(self, ids: Tensor, mask: Tensor, seen: Sequence[int], *, more: bool = False) -> tuple[Tensor, Tensor]:
        border = self.shape.border
        counts = mask.bool().sum(1).tolist()
        length = max(map(sum, zip(seen, counts, strict=False)), default=0)
        if border is not None and self.ranks.sp.size > 1 and length > border:
            raise ValueError(
                f"sp ({self.ranks.sp.size}) cannot read a text of {length} tokens, beyond {BORDER} ({border}): a rank "
                "that has none of the tokens beyond would turn its own otherwise. Use sp 1"
            )
        deal = self.compressed.deal(mask, more=more)
        part = ids.new_zeros(ids.shape[0], deal.width)
        positions = torch.zeros_like(part)
        for row, one in enumerate(deal.maps):
            mine = one.indices(deal.rank, ids.device)
            here = slice(deal.width - len(mine), None)
            part[row, here] = ids[row, mask[row].bool().nonzero().flatten()[mine]]
            positions[row, here] = seen[row] + mine
        return part, positions

    @torch.no_grad()
    def read_again(
        self, forward: Callable[[Tensor, Tensor, Any], Any], ids: Tensor, mask: Tensor | None = None, *,
        chunk: int | None = None,
    ) -> None:  # fmt: skip
        """Read the prompts a second time, for the score rule `reread`: after the first reading, before `finalize()`.

        Every rank of the request calls it with the same whole prompts; sequence ranks share each chunk of them.

        The model repeats the prompts, and what it looks up in the cache to do so is worth keeping, whatever will be
        asked. Each `chunk` tokens of a row are one forward, at the positions that follow the prompt; it
        attends to the whole cache and to itself, and nothing of it is kept.

        Args:
            forward: of the model that has read the prompts: called with ids, positions and this cache.
            ids: [B, T] int64, the prompts, all that the cache has seen; mask: [B, T], 0 marks padding; None: none.
            chunk: tokens of a forward; by default that of the score rule.

        Raises:
            ValueError: other prompts than those of the cache, as far as their lengths tell; no first reading, or one
                that was compressed already, or whose tokens ranks share by `allgather` or `ring`; positions that the
                model does not have.
        """
        mask = _mask_of(ids, mask)
        rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
        chunk = getattr(self.d2o.score, "chunk", Reread().chunk) if chunk is None else chunk
        lengths, seen = [len(row) for row in rows], self.compressed.num_seen
        if lengths != seen:
            raise ValueError(f"the prompts to read a second time have {lengths} tokens, but the cache has seen {seen}")
        last = max(count + min(count, chunk) for count in seen)
        check_side(self.shape.border, max(seen), last)
        limit = self.shape.max_positions
        if limit is not None and last > limit:
            raise ValueError(
                f"a second reading of {max(seen)} tokens in chunks of {chunk} (score.chunk) needs {last} positions, "
                f"but the model has {limit}"
            )
        with self.compressed.rereading(chunk):
            for start in range(0, max(lengths), chunk):
                parts = [row[start : start + chunk] for row in rows]
                width = max(len(part) for part in parts)
                again, padding = ids.new_zeros(len(rows), width), mask.new_zeros(len(rows), width)
                for row, part in enumerate(parts):
                    again[row, width - len(part) :], padding[row, width - len(part) :] = part, 1
                forward(*self.deal_tokens(again, padding), self)

    # ---- rows and results ----------------------------------------------------------------------------------------

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows, in that order, repeated where repeated."""
        self.compressed.select_rows(rows)

    def join(self, *others: Self) -> None:
        """Take in the rows of other caches of the same model and configuration, which must not be used afterwards.

        All have read their prompts. See `CompressedCache.join`.
        """
        self.compressed.join(*(other.compressed for other in others))
        self._longest = max(self._longest, *(other._longest for other in others))

    def reset(self) -> None:
        """Forget everything but the configuration."""
        self.compressed.reset()
        self._longest = 0

    def finalize(self) -> None:
        """Compress now. The first decode step does so by itself; call it to reuse a compressed prompt."""
        with without_autocast():
            self.compressed.finalize()

    def report(self) -> CacheReport:
        """What was asked for, what is held, layer by layer; `print(cache.report())` is a table."""
        return make_report(self.compressed, self.state_bytes)

    @property
    def state_bytes(self) -> int:
        """Of this rank: what layers keep that hold no tokens."""
        return 0


def _mask_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """[B, n] of ids [B, n]: the mask, or ones."""
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} must have input_ids' shape {tuple(ids.shape)}")
    return mask
