"""Rows that join a batch which is decoding go on as they would alone; and so do those that were there."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from tests.models import left_padded, tiny_model
from tests.ranks import run_ranks
from tests.sharded.play import positions_of, thresholds_of
from tests.spec import spec

# (lengths of the prompts, step before which they join): the second joins amid an interval, the third leaves at once.
ARRIVALS = [([61, 40], 0), ([87], 7), ([25, 50], 12)]
STEPS = 40
FIELDS = {"keep_ratio": 0.4, "min_layer_tokens": 8, "eviction_interval": 5}


@torch.no_grad()
def alone(model, config, lengths, steps, *shared):
    """Tokens of each row, and the session."""
    session = Session(model, config, *shared)
    logits = session.prefill(*left_padded(list(lengths), seed=sum(lengths)))
    found = []
    for _ in range(steps):
        found.append(logits.argmax(-1).tolist())
        logits = session.decode(found[-1])
    return session, logits, [list(row) for row in zip(*found, strict=True)]


@torch.no_grad()
def together(model, config, *shared):
    """The same rows in one session: they come, and the first row leaves at the end."""
    running, logits, found = alone(model, config, ARRIVALS[0][0], 0, *shared)
    found, rest = [[] for _ in ARRIVALS[0][0]], ARRIVALS[1:]
    for step in range(STEPS):
        while rest and rest[0][1] == step:
            other, new, _ = alone(model, config, rest[0][0], 0, *shared)
            other.cache.finalize()
            running.join(other)
            logits, found, rest = torch.cat([logits, new]), found + [[] for _ in new], rest[1:]
        picked = logits.argmax(-1).tolist()
        for row, token in zip(found, picked, strict=True):
            row.append(token)
        logits = running.decode(picked)
    return running, found


def check(model, config, *shared):
    running, found = together(model, config, *shared)
    row = 0
    for lengths, begins in ARRIVALS:
        session, _, wanted = alone(model, config, lengths, STEPS - begins, *shared)
        rows = slice(row, row + len(lengths))
        assert found[rows] == wanted
        for mine, theirs in zip(positions_of(running), positions_of(session), strict=True):
            for one, other in zip(mine[rows], theirs, strict=True):
                assert torch.equal(one[..., : theirs.shape[-1]][other >= 0], other[other >= 0])
                assert (one >= 0).sum() == (other >= 0).sum()
        for mine, theirs in zip(thresholds_of(running), thresholds_of(session), strict=True):
            if theirs is not None:
                torch.testing.assert_close(mine[rows], theirs, rtol=1e-9, atol=1e-9)
        assert [running.row_usage(n) for n in range(rows.start, rows.stop)] == [
            session.row_usage(n) for n in range(len(lengths))
        ]
        row = rows.stop
    return found


@pytest.mark.parametrize("preset", ["span", "paper", "h2o", "streaming", "released", "full"])
def test_rules(preset):
    config = spec(preset) if preset == "full" else spec(preset, **FIELDS)
    check(tiny_model().double(), config)


@pytest.mark.parametrize("family", ["mistral_sliding", "qwen2"])
def test_other_models(family):
    check(tiny_model(family).double(), spec("mass", **FIELDS))


def on_rank(rank: int, world: int, layout: dict) -> list:
    shared = (build_mesh(sp=world), ParallelConfig(sp=world, **layout))
    return check(tiny_model().double(), spec("mass", **FIELDS), *shared)


@pytest.mark.multirank
@pytest.mark.parametrize(
    "layout",
    [{"sp_prefill": "allgather"}, {"sp_prefill": "ulysses", "cache_layout": "sequence"},
     {"sp_prefill": "ulysses", "cache_layout": "heads"}],
    ids=["sequence", "moved", "heads"],
)  # fmt: skip
def test_over_sequence_ranks(layout):
    wanted = check(tiny_model().double(), spec("mass", **FIELDS))
    assert run_ranks(2, on_rank, layout) == [wanted] * 2


def test_refusals():
    model, config = tiny_model(), spec("mass", **FIELDS)
    running, _, _ = alone(model, config, [40], 2)
    with pytest.raises(ValueError, match="can be joined"):
        running.join(Session(model, config))
    other, _, _ = alone(model, spec("h2o", **FIELDS), [40], 1)
    with pytest.raises(ValueError, match="of one model, configuration and mesh"):
        running.join(other)
