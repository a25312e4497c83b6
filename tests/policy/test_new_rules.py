"""A rule of one's own is a class and a name in a registry: then YAML knows it, and every path serves it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.fields.declare import real
from d2o_dist.policy.budget import BUDGETS, BudgetRule
from d2o_dist.policy.merge import MERGES, MergeRule
from d2o_dist.policy.score import SCORES, ScoreRule
from d2o_dist.policy.storage import FORMATS, StorageFormat
from d2o_dist.slots.slots import Slots
from tests.models import left_padded, tiny_model, tokens
from tests.ranks import run_ranks
from tests.sharded.play import positions_of


@dataclass(frozen=True)
class Oldest(ScoreRule):
    """The oldest rank highest."""

    name: ClassVar[str] = "oldest"

    def rank(self, slots: Slots, rates: Tensor, num_seen_tokens: Tensor) -> Tensor:
        return -slots.positions.to(slots.scores.dtype)


@dataclass(frozen=True)
class Growing(BudgetRule):
    """Shares that grow with depth by a factor a layer."""

    name: ClassVar[str] = "growing"
    factor: float = real(2.0, above=0)

    def log_weights(self, num_layers: int, measured) -> list[float]:
        weights = torch.arange(num_layers, dtype=torch.float64) * torch.tensor(self.factor, dtype=torch.float64).log()
        return weights.log_softmax(0).tolist()


@dataclass(frozen=True)
class Mean(MergeRule):
    """A kept value becomes the mean of itself and of all that is merged into it."""

    name: ClassVar[str] = "mean"

    def evicted_weight(self, evicted: Slots, similarity: Tensor) -> Tensor:
        return torch.ones_like(similarity)

    def own_weight(self, kept: Slots) -> float:
        return 1.0


@dataclass(frozen=True)
class Int8(StorageFormat):
    """Eight bits a number, and the scale of each vector beside them, as four bytes more."""

    name: ClassVar[str] = "int8"

    def stored(self, head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        return head_dim + 4, torch.int8

    def encode(self, vectors: Tensor) -> Tensor:
        scale = vectors.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return torch.cat([(vectors / scale).round().to(torch.int8), scale.view(torch.int8)], -1)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return (stored[..., :-4] * stored[..., -4:].contiguous().view(torch.float32)).to(dtype)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(SCORES, "oldest", Oldest)
    monkeypatch.setitem(BUDGETS, "growing", Growing)
    monkeypatch.setitem(MERGES, "mean", Mean)
    monkeypatch.setitem(FORMATS, "int8", Int8)


@torch.no_grad()
def run(config: D2OConfig, steps: int) -> tuple[D2OCache, D2OCache]:
    """After the prompt, and after so many tokens more."""
    model = tiny_model()
    ids, mask = left_padded([60, 41])
    cache = D2OCache(config=model.config, d2o=config)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.finalize()
    first = copy.deepcopy(cache)
    for step in range(steps):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        model(torch.full((2, 1), 5 + step), attention_mask=mask, past_key_values=cache)
    return first, cache


def test_a_score_rule_and_a_budget_rule():
    config = D2OConfig.from_dict(
        {"keep_ratio": 0.5, "score": "oldest", "merge": "drop", "eviction_interval": 3,
         "budget": {"rule": "growing", "factor": 1.5, "min_layer_tokens": 4}}
    )  # fmt: skip
    for cache, seen in zip(run(config, 9), ([60, 41], [69, 50]), strict=True):
        budgets = [layer.slot_budgets for layer in cache.layers]
        for row, total in enumerate((60, 41)):
            assert sum(slots[row] for slots in budgets) == total * 4 // 2
            assert [slots[row] for slots in budgets] == sorted(slots[row] for slots in budgets)
        for layer in cache.layers:
            for row, num_tokens in enumerate(seen):
                heavy, recent = config.split(layer.slot_budgets[row])
                kept = [*range(heavy), *range(num_tokens - recent, num_tokens)]
                assert layer.positions[row, :, : len(kept)].tolist() == [kept] * 2


def test_a_merge_rule():
    """Values change, and nothing else does."""
    fields = {"keep_ratio": 0.5, "score": "oldest", "eviction_interval": 3,
              "budget": {"rule": "uniform", "min_layer_tokens": 4}}  # fmt: skip
    merged, _ = run(D2OConfig.from_dict({**fields, "merge": "mean"}), 0)
    dropped, _ = run(D2OConfig.from_dict({**fields, "merge": "drop"}), 0)
    for mine, theirs in zip(merged.layers, dropped.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions) and torch.equal(mine.keys, theirs.keys)
        assert not torch.equal(mine.values, theirs.values)
    assert all(layer.num_merged > 0 for layer in merged.report().layers)


@pytest.mark.parametrize("preset", ["d2o", "paper", "h2o"])
def test_a_storage_format(preset):
    """What a prompt leaves is what it is without the format, up to rounding; it goes through evictions and merges."""
    fields = {"keep_ratio": 0.5, "eviction_interval": 3, "budget": {"min_layer_tokens": 12}}
    (first, last), (exact, exact_last) = (
        run(D2OConfig.preset(preset, **fields, storage=storage), 12) for storage in ("int8", "exact")
    )
    heads, dim = first.layers[0].shape
    for mine, theirs in zip(first.layers, exact.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions) and mine.keys.dtype == theirs.keys.dtype
        for name in ("keys", "values"):
            stored, wanted = getattr(mine, name), getattr(theirs, name)
            step = wanted.abs().amax(-1, keepdim=True) / 127
            assert bool(((stored - wanted).abs() <= 0.51 * step).all()) and not torch.equal(stored, wanted)
    for mine, theirs in zip(last.report().layers, exact_last.report().layers, strict=True):
        assert mine.num_bytes == heads * 2 * (dim + 4) * sum(mine.kv_len)
        assert mine.kv_len == theirs.kv_len and mine.full_bytes == theirs.full_bytes
        assert mine.num_merged + mine.num_dropped == theirs.num_merged + theirs.num_dropped > 0


@torch.no_grad()
def read_and_decode(rank: int, world: int) -> list[list]:
    """Positions and tokens, of slots that are stored as int8, of all sequence ranks."""
    FORMATS["int8"] = Int8
    config = D2OConfig.preset("d2o", keep_ratio=0.4, budget={"min_layers": 0, "min_layer_tokens": 8}, storage="int8")
    shared = (build_mesh(sp=world), ParallelConfig(sp=world, sp_prefill="allgather")) if world > 1 else ()
    session = Session(tiny_model().double(), config, *shared)
    ids = tokens(1, 90)
    logits, found = session.prefill(ids, torch.ones_like(ids)), []
    for _ in range(20):
        found.append(logits.argmax(-1).tolist())
        logits = session.decode(found[-1])
    return [found, *(one.tolist() for one in positions_of(session))]


@pytest.mark.multirank
def test_a_storage_format_over_sequence_ranks():
    assert run_ranks(2, read_and_decode) == [read_and_decode(0, 1)] * 2


def test_their_fields_are_checked_and_named():
    with pytest.raises(ValueError, match=r"budget.factor \(0\) must be above 0"):
        D2OConfig(budget={"rule": "growing", "factor": 0})
    assert D2OConfig(score="oldest").to_dict()["score"] == {"rule": "oldest"}
    assert not D2OConfig(score="oldest", budget="uniform", merge="drop").needs_rates
