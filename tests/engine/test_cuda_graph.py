"""Decode steps as CUDA graphs: on a GPU. What of it a CPU can show is in test_stepper.py."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from benchmarks.checks import decode_graph
from d2o_dist.engine.session import Session, left_pad
from tests.models import tiny_model
from tests.spec import spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", decode_graph.CASES)
def test_replays_equal_python(name):
    result = decode_graph.run(decode_graph.CASES[name], "cuda")
    assert result.is_right, {key: value for key, value in result.errors.items() if value[0] > value[1]}


def session_of(model) -> Session:
    session = Session(model, spec("mass", keep_ratio=0.3, min_layer_tokens=12), decode_graph="always")
    with torch.inference_mode():
        session.prefill(*left_pad([list(range(2, 62))], 0))
    return session


def test_a_forward_that_waits_is_refused():
    """Found in the warm-up, before anything is captured; the process can go on."""
    model = tiny_model().float().cuda()
    session = session_of(model)

    def wait(module, inputs, out) -> None:
        out.sum().item()

    handle = model.model.layers[1].register_forward_hook(wait)
    with torch.inference_mode(), pytest.raises(ValueError, match="its forward waits for the device"):
        session.decode([3])
    handle.remove()
    other = session_of(model)
    with torch.inference_mode():
        for token in range(2, 8):
            other.decode([token])
    assert other.num_replayed == 5


def test_memory_goes_with_the_session():
    model = tiny_model().float().cuda()

    def run() -> None:
        session = session_of(model)
        with torch.inference_mode():
            for token in range(2, 8):
                session.decode([token])
        dead.append(weakref.ref(session._stepper._recorder))

    dead: list = []
    run()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(5):
        run()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before and all(one() is None for one in dead)
