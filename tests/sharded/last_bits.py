"""Requests of which one rank computes something a last bit off, as another processor or library might."""

from __future__ import annotations

import torch

from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.encode import Request
from d2o_dist.engine.loop import generate
from d2o_dist.engine.session import Session
from d2o_dist.models.hf.shard import shard_model
from d2o_dist.policy.score import SCORES
from tests.engine.tiny import Numbers
from tests.models import VOCABULARY, tiny_model
from tests.sharded.play import budgeted, thresholds_of
from tests.spec import spec

OFF = 1 + 2.0**-50
LOGIT_OFF = 1 + 2.0**-22  # of float32, which `generate` makes of all logits


def off_by_last_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Every other number times `OFF`."""
    factor = torch.ones_like(tensor)
    factor.view(-1)[::2] = OFF
    return tensor * factor


def spoil_keys(model: torch.nn.Module) -> None:
    """Let `k_proj` of all layers give other last bits."""
    for name, module in model.named_modules():
        if name.endswith("k_proj"):
            module.register_forward_hook(lambda module, args, out: off_by_last_bits(out))


def coarse(ranking: torch.Tensor) -> torch.Tensor:
    """Few different ranks, so that many slots tie."""
    return (ranking.clamp_min(1e-9).log2() / 2).round()


def tie_ranks(change) -> None:
    """Let slots of this process rank by `change` of a coarse rank, whatever the rule."""
    for rule in SCORES.values():
        rule.rank = lambda self, *args, _of=rule.rank: change(coarse(_of(self, *args)))


def repeated(length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One token over and over: keys differ by their angle alone, so the kept ones before and after an evicted one are
    equally near, and many slots get about the same attention."""
    ids = torch.arange(2, 2 + rows)[:, None].expand(rows, length).contiguous()
    mask = torch.ones_like(ids)
    mask[1:, :7] = 0
    return ids * mask, mask


@torch.no_grad()
def decided(rank: int, world: int, parallel: ParallelConfig, preset: str, d2o: dict, odd: int) -> dict:
    """What this rank holds and decided after a prompt, a dozen tokens, another turn and a dozen more.

    Rank `odd` has other last bits.
    """
    mesh = build_mesh(sp=parallel.sp, tp=parallel.tp)
    model = tiny_model(num_key_value_heads=1, num_hidden_layers=3)
    model = shard_model(model, mesh, parallel, torch.device("cpu"))
    if rank == odd:
        spoil_keys(model)
    tie_ranks(off_by_last_bits if rank == odd else torch.clone)
    config = spec(preset, **{"keep_ratio": 0.4, "min_layer_tokens": 8, "eviction_interval": 4, **d2o})
    session = Session(model, config, mesh, parallel)
    found: list[list[torch.Tensor]] = []

    def note() -> None:
        layers = session.cache.compressed.layers
        found.append([unit.store.slots.positions.clone() for layer in layers for unit in layer.blocks])

    for length in (60, 20):
        session.prefill(*repeated(length, 2))
        note()
        for _ in range(12):
            session.decode([2, 3])
            note()
    units = [unit for layer in session.cache.compressed.layers for unit in layer.blocks]
    return {
        "held": [(unit.store.slots.keys, unit.store.slots.values) for unit in units],
        "positions": found, "budgets": budgeted(session, "slot_budgets"),
        "kv_len": budgeted(session, "kv_len"), "thresholds": thresholds_of(session),
        "merged": [unit.state.num_merged for unit in units],
    }  # fmt: skip


def picked(rank: int, world: int, parallel: ParallelConfig, sampling: SamplingConfig) -> tuple[list[list[int]], dict]:
    """Tokens of `engine.loop.generate`, where two entries of the vocabulary are always equally likely and rank 1 finds
    the second a last bit likelier; and what was sent to agree on them."""
    mesh = build_mesh(sp=parallel.sp, tp=parallel.tp)
    model = tiny_model()
    if parallel.tp > 1:
        model = shard_model(model, mesh, parallel, torch.device("cpu"))
    model.register_forward_hook(tied)
    if rank == 1:
        model.register_forward_hook(second_is_likelier)
    session = Session(model, spec("mass", keep_ratio=0.4, min_layer_tokens=8), mesh, parallel)
    requests = [Request(n, str(n), tuple(range(2, 20 + n)), 12) for n in range(3)]
    results = generate(session, requests, sampling, Numbers())
    return [result.tokens for result in results], session.cache.ranks.counter.to_dict()["token"]


def tied(module, args, out):
    """Of neighbours in the vocabulary both are as likely as the likelier one."""
    pairs = out.logits[..., : VOCABULARY // 2 * 2].unflatten(-1, (-1, 2))
    pairs.copy_(pairs.amax(-1, keepdim=True).expand_as(pairs).clone())
    return out


def second_is_likelier(module, args, out):
    """By a last bit."""
    seconds = out.logits[..., 1::2]
    seconds.copy_(torch.where(seconds > 0, seconds * LOGIT_OFF, seconds / LOGIT_OFF))
    return out
