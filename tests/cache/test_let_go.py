"""What steps know of buffers does not keep these alive, and is not taken for other buffers."""

from __future__ import annotations

import gc

import pytest
import torch

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.core.softmax import Softmax
from tests.models import tiny_model

CONFIG = D2OConfig(keep_ratio=0.3, budget={"min_layer_tokens": 4}, eviction_interval=4)


def arenas() -> int:
    gc.collect()
    return sum(type(one).__name__ == "Arena" for one in gc.get_objects())


@pytest.mark.parametrize("then", ["rows are selected", "a later turn is read", "a cache is joined", "reset"])
def test_buffers_go_when_slots_move(then):
    model, before = tiny_model(), arenas()
    caches = [D2OCache(model.config, CONFIG) for _ in range(2)]
    ids = torch.randint(3, 80, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for cache in caches:
            for part in (ids, ids[:, :1], ids[:, 1:2]):
                model(part, past_key_values=cache)
        cache = caches.pop()
        assert arenas() == before + 2
        if then == "rows are selected":
            cache.select_rows(torch.tensor([1, 0]))
            model(ids[:, :1], past_key_values=cache)
        elif then == "a later turn is read":
            model(ids, past_key_values=cache)
        elif then == "a cache is joined":
            other = caches.pop()
            cache.join(other)
            del other
        else:
            cache.reset()
    assert arenas() == before + (1 if then == "a cache is joined" else len(caches) + (then == "rows are selected"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Softmax(1.0), Softmax(1.0), True), (Softmax(1.0), Softmax(2.0), False),
        (Softmax(1.0, 5.0), Softmax(1.0), False), (Softmax(1.0, 5.0), Softmax(1.0, 5.0), True),
        (Softmax(1.0, sinks=torch.ones(1, 2)), Softmax(1.0), False),
        (Softmax(1.0, sinks=torch.ones(1, 2)), Softmax(1.0, sinks=torch.ones(1, 2)), False),
    ],
)  # fmt: skip
def test_a_softmax_is_another_one(one, other, same):
    assert one.is_same(other) == same


def test_a_softmax_with_the_same_sinks():
    sinks = torch.ones(4)
    assert Softmax(1.0, sinks=sinks.view(1, 4)).is_same(Softmax(1.0, sinks=sinks.reshape(1, -1)))
    assert not Softmax(1.0, sinks=sinks[None, :2]).is_same(Softmax(1.0, sinks=sinks[None, 2:]))
