"""One request on a mesh of ranks, with all that a cache decides along the way; and the same on one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from d2o_dist.comm import TrafficCounter, build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.models.hf.shard import shard_model
from d2o_dist.models.layer import LayerView
from d2o_dist.policy import D2OConfig
from tests.models import left_padded, tiny_model
from tests.oracle.naive_d2o import use_float64_norms
from tests.spec import spec


@dataclass(frozen=True)
class Play:
    """A request: a model, prompts, a configuration, and how long it goes on."""

    family: str = "llama"
    preset: str = "d2o"
    lengths: tuple[int, ...] = (97,)
    steps: int = 28
    chunk: int | None = None
    seed: int = 0
    ends: tuple[int, ...] = ()  # a row that ends before the others
    turn: tuple[int, ...] = ()  # lengths of a second turn, after which decoding goes on
    layers: int = 3  # the fewest of which one can get more than the average and another does not just get the rest
    model: dict[str, Any] = field(default_factory=dict)
    d2o: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    reading: str = "whole"

    @property
    def config(self) -> D2OConfig:
        size = {} if self.preset == "full" else {"keep_ratio": 0.4}
        return spec(self.preset, **{**size, "min_layer_tokens": 8, **self.d2o})


def views_of(session: Session) -> list[LayerView]:
    """Of the layers that have keys of their own."""
    return [layer for layer in session.cache.layers if isinstance(layer, LayerView)]


def positions_of(session: Session) -> list[torch.Tensor]:
    """Per layer the kept positions [B, H, S] of all heads of the model, ascending, -1 last, on every rank."""
    ranks, found = session.cache.ranks, []
    for layer in views_of(session):
        mine = layer.positions
        if session.cache.d2o.budget.per_head:  # ranks differ in their fullest head
            mine = pad(mine, (0, max(layer.kv_len) - mine.shape[2]), value=-1)
        sharded = ranks.deals_tokens and not layer.is_sliding
        if sharded and ranks.by_heads:
            mine = ranks.join_heads(mine)
        elif sharded:
            mine = ranks.sp.all_gather(mine, 2)
        elif ranks.deals_tokens and ranks.by_heads:
            mine = ranks.join_heads(mine)
        order = mine.masked_fill(mine < 0, 1 << 40).sort(-1).values
        found.append(ranks.tp.all_gather(order.masked_fill(order == 1 << 40, -1), 1)[:, :: ranks.kv_replicas])
    return [one[..., : int((one >= 0).sum(-1).max())] for one in found]


def budgeted(session: Session, name: str) -> list[Any]:
    """`name` of all that has a budget of its own, on other ranks too, and of sliding-window layers."""
    layers = session.cache.compressed.layers
    return [getattr(one, name, None) for layer in layers for one in getattr(layer, "budgeted", [layer])]


def thresholds_of(session: Session) -> list[torch.Tensor | None]:
    """Per layer [B], or [B, H] of all heads of the model, on every rank."""
    ranks, found = session.cache.ranks, []
    for view, layer in zip(views_of(session), session.cache.compressed.layers, strict=True):
        if view.is_sliding or not session.cache.d2o.budget.per_head:
            found.append(view.threshold)
            continue
        nan = torch.full((len(view.kv_len),), torch.nan, dtype=view.scores.dtype)
        mine = torch.stack([nan if unit.state.threshold is None else unit.state.threshold for unit in layer.blocks], 1)
        found.append(ranks.gather_kv_heads(ranks.join_heads(mine)))
    return found


def shares_of(layer: Any) -> torch.Tensor | None:
    """[B, H, world] slots of each sequence rank; None where all slots of a head are on one."""
    layout = getattr(layer.blocks[0], "layout", None)
    return layout.shares.held if layout is not None and layout.is_spread else None


@torch.no_grad()
def play(one: Play, mesh=None, parallel=None, counter=None) -> dict[str, Any]:
    """Greedy decoding: tokens, logits of every step, positions after the prompt and at the end, budgets, thresholds."""
    model = tiny_model(one.family, seed=one.seed, num_hidden_layers=one.layers, **one.model).to(one.dtype)
    if mesh is not None:
        model = shard_model(model, mesh, parallel, torch.device("cpu"))
    if one.dtype == torch.float64 and one.family != "gemma3":
        use_float64_norms(model)  # or they would round differences away, and make some as large as float32's
    return play_on(Session(model, one.config, mesh, parallel, counter, reading=one.reading), one)


@torch.no_grad()
def play_on(session: Session, one: Play) -> dict[str, Any]:
    """`play` with a session of a model of any library."""
    ids, mask = left_padded(list(one.lengths), one.seed)
    logits = session.prefill(ids, mask, one.chunk)
    first = positions_of(session)
    tokens, all_logits = [], [logits]

    def decode(logits: torch.Tensor, live: list[bool] | None = None) -> torch.Tensor:
        tokens.append(logits.argmax(-1).tolist())
        all_logits.append(session.decode(tokens[-1], live))
        return all_logits[-1]

    for _ in range(one.steps):
        logits = decode(logits)
    if one.turn:
        all_logits.append(session.prefill(*left_padded(list(one.turn), one.seed + 1), one.chunk))
        logits = all_logits[-1]
        for _ in range(one.steps):
            logits = decode(logits)
    if one.ends:
        # One row ends and is fed padding, then it leaves.
        live = [row != one.ends[0] for row in range(len(one.lengths))]
        for _ in range(10):
            logits = decode(logits, live)
        rows = [row for row, goes_on in enumerate(live) if goes_on]
        session.keep_rows(rows)
        logits = logits[rows]
        for _ in range(10):
            logits = decode(logits)
    cache = session.cache
    return {
        "tokens": tokens,
        "logits": torch.cat(all_logits),
        "first": first,
        "last": positions_of(session),
        "budgets": budgeted(session, "slot_budgets"),
        "kv_len": budgeted(session, "kv_len"),
        "thresholds": thresholds_of(session),
        "usage": [session.row_usage(row) for row in range(len(logits))],
        "held": [shares_of(layer) for layer in cache.compressed.layers],
    }


def on_rank(rank: int, world: int, one: Play, parallel: ParallelConfig) -> tuple[dict[str, Any], dict]:
    """`play` on this rank of a world of sp x tp."""
    counter = TrafficCounter()
    mesh = build_mesh(dp=1, sp=parallel.sp, tp=parallel.tp)
    return play(one, mesh, parallel, counter), counter.to_dict()


def assert_same(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-10) -> None:
    """Kept positions, budgets, lengths and tokens equal; thresholds and logits to rounding."""
    for when in ("first", "last"):
        for layer, (mine, theirs) in enumerate(zip(found[when], wanted[when], strict=True)):
            assert mine.shape == theirs.shape, (when, layer, mine.shape, theirs.shape)
            assert torch.equal(mine, theirs), (when, layer, (mine != theirs).sum())
    for name in ("tokens", "budgets", "kv_len", "usage"):
        assert found[name] == wanted[name], name
    for mine, theirs in zip(found["thresholds"], wanted["thresholds"], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0, equal_nan=True)
    torch.testing.assert_close(found["logits"], wanted["logits"], rtol=tolerance, atol=tolerance)
