"""`Session`: one batch on its way through one model: prefill, finalize, decode, step by step.

Shape legend: B rows, T prompt columns (padding included), V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.cuda_graph import graph_recorder
from d2o_dist.engine.reading import STREAM_CHUNK, TILE, read, read_stream
from d2o_dist.engine.stepper import Stepper
from d2o_dist.models.cache import settle_reading
from d2o_dist.models.loading import adapt
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.windows import kept


@dataclass(frozen=True)
class RowUsage:
    """What the cache holds for one row, on all ranks that share it.

    `achieved_keep_ratio` leaves layers with windows out, the bytes do not.
    """

    achieved_keep_ratio: float
    held_bytes: int
    full_bytes: int


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """`(input_ids, attention_mask)`, both [B, T] int64, padded on the left to the longest prompt."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in prompts])
    lengths = torch.tensor([len(row) for row in prompts])
    return ids, (torch.arange(width) >= width - lengths[:, None]).long()


class Session:
    """One batch: its rows, their cache, and how long the parts of the prefill took.

    Args:
        model: in evaluation mode; of Hugging Face, loaded with `attn_implementation="d2o"`. Or its adapter.
        d2o: how the cache is compressed.
        mesh, parallel, counter: see `ModelCache`. Every rank that shares the batch makes the same calls with the same
            arguments, and gets the same logits but for rounding. So tokens are picked on one rank and sent to the
            others: `Sampler` does, and so does `session.cache.ranks.from_first(tokens)`.
        decode_graph: whether decode steps are CUDA graphs: `auto` (where that is possible), `always`, `never`.
        reading: when a prompt is compressed: `auto`, `whole`, `layerwise`, `stream`; see `InferConfig`.
        steady: decode steps have a multiple of so many rows, with padding; of the number that `agreed_rows` finds a
            row's logits on a CPU do not depend, to the last bit, on how many rows there are, what they hold, and its
            place among them. 1: they may.

    Raises:
        ValueError: what `ModelCache` refuses; `always` where it is impossible.

    Attributes:
        cache: the batch's `ModelCache`, of the kind that the model takes.
        prefill_s: seconds that the last prompt took, a second reading included, and the compression where a prompt is
            read layer by layer; None before.
    """

    def __init__(
        self,
        model: Any,
        d2o: D2OConfig,
        mesh: ParallelMesh | None = None,
        parallel: ParallelConfig | None = None,
        counter: TrafficCounter | None = None,
        decode_graph: str = "auto",
        reading: str = "auto",
        steady: int = 1,
    ) -> None:
        self.model = adapt(model)
        self.cache = self.model.make_cache(d2o, mesh, parallel, counter)
        self.cache.compressed.is_steady = steady > 1
        self._reading = settle_reading(reading, self.model.tile_refusal, self.cache.d2o)
        recorder = graph_recorder(decode_graph, self.model.shape, self.device, self.cache.ranks)
        multiple = steady if self.cache.takes_padding else 1
        self._stepper = Stepper(self.model, recorder, required=decode_graph == "always", multiple=multiple)
        self.prefill_s: float | None = None

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self.model.device

    @property
    def num_replayed(self) -> int:
        """Decode steps that were replays of a CUDA graph."""
        return self._stepper.num_replayed

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor, chunk: int | None = None) -> Tensor:
        """Read the prompts, or the next turn of each, and compress them: [B, T] -> next-token logits [B, V].

        With the score rule `reread` the prompts of the first turn are read twice.

        Args:
            attention_mask: [B, T], 0 marks padding, which is on the left.
            chunk: columns of one forward, or where a prompt is read layer by layer of a tile, at least 2; None: the
                whole prompt, tiles of `TILE`, or of a stream `STREAM_CHUNK`. Bounds the memory of activations.

        Raises:
            ValueError: a chunk below 2, a row that ends in padding or has no token, a later turn of one column.
        """
        seen = self.cache.compressed.num_seen
        if seen and input_ids.shape[1] < 2:
            raise ValueError("a later turn needs at least 2 tokens (1 was given): one token is a decode step")
        if chunk is not None and chunk < 2:
            raise ValueError(f"chunk ({chunk}) must be at least 2")
        if not bool(attention_mask[:, -1].all()) or bool((attention_mask.diff(dim=1) < 0).any()):
            raise ValueError("prompts must be padded on the left, and every row needs a token")
        began = self._now()
        if self._reading == "stream":
            logits = read_stream(self.model, self.cache, input_ids, attention_mask, chunk or STREAM_CHUNK)
        else:
            by_layer = self._reading == "layerwise"
            chunk = TILE if by_layer and chunk is None else chunk
            logits = read(self.model, self.cache, input_ids, attention_mask, chunk, is_layerwise=by_layer)
        if self.cache.d2o.needs_reread and not seen:
            self.cache.read_again(self.model.forward, input_ids.to(self.device), attention_mask.to(self.device))
        self.prefill_s = self._now() - began
        self.cache.finalize()
        return logits

    @torch.no_grad()
    def decode(self, tokens: Sequence[int] | Tensor, present: Sequence[bool] | None = None) -> Tensor:
        """One step: the rows' newest tokens, B of them -> next-token logits [B, V].

        Args:
            present: rows that go on. The others hold no more tokens, and their logits mean nothing. None: all go on.
        """
        return self._stepper.step(self.cache, tokens, present)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch, in this order; the memory of the others is freed."""
        self.cache.select_rows(torch.tensor(rows))

    def join(self, *others: Session) -> None:
        """Go on with the rows of other sessions of the same model too, after those that are here."""
        self.cache.join(*(other.cache for other in others))

    def row_usage(self, row: int) -> RowUsage:
        """What the cache holds for one row now, and what an uncompressed one would."""
        seen = self.cache.compressed.num_seen[row]
        held_tokens = seen_tokens = held_bytes = full_bytes = 0
        compressed = self.cache.compressed
        for index, window in enumerate(compressed.windows):
            layer, heads = compressed.layers[index], compressed.kv_heads(index)
            held, token_bytes = layer.mean_kv_len[row], heads * layer.token_bytes
            held_bytes += round(held * heads * layer.slot_bytes)
            if window is None:
                held_tokens, seen_tokens = held_tokens + held, seen_tokens + seen
                full_bytes += seen * token_bytes
            else:
                full_bytes += kept(window, seen) * token_bytes
        return RowUsage(held_tokens / seen_tokens if seen_tokens else 1.0, held_bytes, full_bytes)

    def most_kept(self, row: int, num_tokens: int) -> list[float]:
        """Slots that each compressed layer has for a row while it decodes; of each head, if heads have budgets.

        Args:
            num_tokens: of its prompt and of its answer, at most: what a layer holds that is never evicted.
        """
        compressed = self.cache.compressed
        interval = compressed.config.eviction_interval
        layers = [compressed.layers[index] for index in compressed.full_layers]
        budgets = [one.slot_budgets for layer in layers for one in layer.budgeted]
        return [num_tokens if slots is None or interval is None else slots[row] + interval for slots in budgets]

    def layers_not_finite(self) -> list[int | None]:
        """By row, the first layer whose keys or values are not finite; None where all are. Every rank of the request
        calls it. It waits for the device: for rows that have failed."""
        bad = []
        for layer in self.cache.compressed.layers:
            slots = layer.slots
            finite = slots.keys.isfinite().all(-1) & slots.values.isfinite().all(-1)
            bad.append((slots.live & ~finite).flatten(1).any(1))
        everywhere = self.cache.ranks.request.all_reduce(torch.stack(bad).int(), "max").T.tolist()
        return [next((index for index, found in enumerate(row) if found), None) for row in everywhere]

    @property
    def rank_bytes(self) -> int:
        """Bytes of all buffers of the cache on this rank: room to grow, positions, statistics and states included."""
        return sum(layer.num_allocated_bytes for layer in self.cache.compressed.layers) + self.cache.state_bytes

    def _now(self) -> float:
        """Seconds, after all work on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
