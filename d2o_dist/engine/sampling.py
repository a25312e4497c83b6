"""Choosing next tokens. A row's choice depends on its own logits, tokens and random numbers, never on its batch.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2o_dist.comm.request import RequestRanks
from d2o_dist.config.sampling import SamplingConfig

# In place of tokens, and below all of them: of a row that has none; of all rows, where a rank wants to end the run.
LOST, STOPPED = -1, -2


def is_lost(logits: Tensor) -> Tensor:
    """[..., V] -> [...] bool: NaN or +inf among them, or nothing but -inf. Some of -inf are tokens never chosen."""
    return ~logits.amax(-1).isfinite()


def row_seed(seed: int, index: int) -> int:
    """A seed of 32 bits for one row. Hashed, because PyTorch's CPU generator reads no more than 32 bits of a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4], "little")


def warp(config: SamplingConfig, scores: Tensor, seen: Tensor | None = None) -> Tensor:
    """What is done to logits [B, V] before the choice, in the order and the way `generate` of transformers does it.

    Args:
        seen: [B, T] tokens of each row so far; for a repetition penalty.
    """
    if config.repetition_penalty != 1:
        found, penalty = scores.gather(1, seen), config.repetition_penalty
        scores = scores.scatter(1, seen, torch.where(found < 0, found * penalty, found / penalty))
    if config.is_greedy:
        return scores
    scores = scores / config.temperature
    if config.top_k:
        lowest = scores.topk(min(config.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if config.top_p < 1:
        ascending, order = scores.sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(1, order, out), -torch.inf)
    return scores


class Sampler:
    """Picks the next token of every row of a batch.

    Args:
        config: how to choose.
        indices: per row its index in the whole input, which with `config.seed` seeds its random numbers.
        prompts: per row the token ids of its prompt.
        device: where the logits will be.
        ranks: those that share the batch. The first of them picks, from its own logits, and the others are told; a row
            that is lost on one of them is lost on all. None: this process alone.
        stops: whether this rank wants to end the run; asked at every choice.
    """

    def __init__(
        self,
        config: SamplingConfig,
        indices: Sequence[int],
        prompts: Sequence[Sequence[int]],
        device: torch.device,
        ranks: RequestRanks | None = None,
        stops: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self._stops = stops
        self._ranks = RequestRanks.alone() if ranks is None else ranks
        self._generators: list[torch.Generator] | None = None
        if not config.is_greedy:
            self._generators = [torch.Generator(device).manual_seed(row_seed(config.seed, i)) for i in indices]
        # [B, T] tokens seen. Shorter rows repeat a token of their own: seen once or twice is the same penalty, whereas
        # a padding token would be penalised in some batches and not in others.
        self._seen: Tensor | None = None
        if config.repetition_penalty != 1:
            width = max(len(ids) for ids in prompts)
            rows = [[ids[0]] * (width - len(ids)) + list(ids) for ids in prompts]
            self._seen = torch.tensor(rows, device=device)

    def pick(self, logits: Tensor) -> list[int]:
        """The next token of each row from its logits [B, V]; `LOST` for a row whose logits are NaN or infinite;
        `STOPPED` for all rows if a rank stops. All ranks that share the batch call it together."""
        scores = logits if logits.dtype == torch.float64 else logits.float()
        scores = warp(self.config, scores, self._seen)
        if self._generators is None:
            chosen = scores.argmax(-1)
        else:
            chosen = _draw(scores.softmax(-1), self._generators)
        # With the tokens, so that the host waits for the device once.
        chosen = self._agreed(chosen.masked_fill(is_lost(scores), LOST))
        if self._seen is not None:
            self._seen = torch.cat([self._seen, chosen.clamp(min=0)[:, None]], 1)
        return chosen.tolist()

    def _agreed(self, chosen: Tensor) -> Tensor:
        """The first rank's choice [B] on all ranks, but `LOST` where it is one of theirs, or all `STOPPED`. One
        collective."""
        request = self._ranks.request
        if request.rank > 0:
            chosen = torch.where(chosen == LOST, LOST, torch.iinfo(chosen.dtype).max)
        if self._stops():
            chosen = torch.full_like(chosen, STOPPED)
        with self._ranks.counter.phase("token"):
            return request.all_reduce(chosen, "min")

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch, in this order."""
        if self._generators is not None:
            self._generators = [self._generators[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[list(rows)]

    def join(self, other: Sampler) -> None:
        """Pick for the rows of another sampler of the same configuration too, after those that are here."""
        if self._generators is not None:
            self._generators += other._generators
        if self._seen is not None:
            width = max(self._seen.shape[1], other._seen.shape[1])
            self._seen = torch.cat([_widened(one._seen, width) for one in (self, other)])


def _widened(seen: Tensor, width: int) -> Tensor:
    """[B, T] -> [B, width]: each row's first token repeated in front."""
    return torch.cat([seen[:, :1].expand(-1, width - seen.shape[1]), seen], 1)


def _draw(probs: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row [B] of probabilities [B, V], by the row's own generator; of a row that holds NaN, any.

    What `torch.multinomial` draws. But that asserts on a GPU that there is no NaN, and a device on which an assertion
    failed serves nobody any more: one row would end all that come after it.
    """
    noise = torch.empty_like(probs)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return (probs / noise).argmax(-1)
