"""What crosses between host and device in a decoded token, counted by the calls that do it: one array each way."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.loop import Running
from d2o_dist.engine.session import Session
from tests.engine.tiny import Numbers, request
from tests.models import tiny_model, tokens
from tests.spec import spec

TO_HOST = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}


class Copies(TorchFunctionMode):
    """Counts calls of the library that would wait for a GPU, and those that would send it something."""

    def __init__(self) -> None:
        super().__init__()
        self.to_host: Counter[str] = Counter()
        self.to_device: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.startswith("d2o_dist"):
            moved = function is Tensor.to and any(isinstance(one, (torch.device, str)) for one in args)
            made = function in (torch.tensor, torch.as_tensor) and "device" in kwargs
            self.to_host[caller] += function in TO_HOST
            self.to_device[caller] += moved or made
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("preset", ["d2o", "reread"])
def test_a_token_is_one_copy_each_way(preset, sampling):
    """The tokens that were picked come, and go back as input. All other tables of a step are made when rows change."""
    session = Session(tiny_model("llama"), spec(preset, keep_ratio=0.5, min_layer_tokens=8))
    prompts = [tokens(1, 60 - row, row)[0].tolist() for row in range(3)]
    running = Running(session, [request(row, ids, 99) for row, ids in enumerate(prompts)], sampling, Numbers())
    stores = [block.store for layer in session.cache.compressed.layers for block in layer.blocks]
    quiet = 0
    running.step()  # makes the tables of these rows
    for _ in range(24):
        held = [list(store.kv_len) for store in stores]
        with Copies() as copies:
            running.step()
        grown = [[count + 1 for count in counts] for counts in held]
        if [list(store.kv_len) for store in stores] == grown:  # an eviction makes its tables, where they are new
            quiet += 1
            assert +copies.to_host == {"d2o_dist.engine.sampling": 1}
            assert +copies.to_device == {"d2o_dist.engine.stepper": 1}
    assert 10 < quiet < 24
