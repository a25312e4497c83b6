"""Rows that fail on one rank, or on all, cost themselves: ranks that share requests go on together."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.engine import runner as running
from tests.engine.test_many_ranks import PATIENCE_S, read, steady, whole_run, write_config
from tests.engine.tiny import make_folder
from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"), num_attention_heads=8)


def fail(where: str):
    """Make the rows whose batch has r2 fail at one place of the run."""
    real_load, real_generate, failing = running.loading.load_model, running.generate, [False]

    def give_up(*args):
        if failing[0]:
            raise MemoryError("no room")

    def load(*args):
        model = real_load(*args)
        layer = model.model.layers[1]
        {
            "before attention": lambda: layer.register_forward_pre_hook(give_up),
            "after attention": lambda: layer.mlp.register_forward_pre_hook(give_up),
            "a decode step": lambda: layer.mlp.register_forward_pre_hook(
                lambda module, args: give_up() if args[0].shape[1] == 1 else None
            ),
        }.get(where, lambda: None)()
        return model

    def generate(session, requests, *args, **kwargs):
        failing[0] = any(request.id == "r2" for request in requests)
        if where == "compression":
            real_finalize = session.cache.finalize
            session.cache.finalize = lambda: (give_up(), real_finalize())
        results = real_generate(session, requests, *args, **kwargs)
        if where == "at the end":
            give_up()
        return results

    running.loading.load_model, running.generate = load, generate


def run_with_fault(rank, world, values, where, on):
    if on is None or rank in on:
        fail(where)
    return whole_run(rank, world, values)


PLACES = ("before attention", "after attention", "a decode step", "compression", "at the end")
SP, TP = (1, 2, 1), (1, 1, 2)
CASES = [(SP, "transformers", "after attention", [1]), (TP, "deepspeed", "a decode step", [1])]
MORE = [(SP, "transformers", place, [1]) for place in PLACES if place != "after attention"]
MORE += [(TP, engine, "after attention", [1]) for engine in ("transformers", "deepspeed")]
MORE += [(SP, "transformers", "after attention", on) for on in ([0], None)]
MORE += [((1, 2, 2), "transformers", "after attention", [2]), ((2, 2, 1), "transformers", "a decode step", [1, 3])]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("shape", "engine", "where", "on"), CASES, ids=str)
def test_a_row_that_fails_costs_one_row(folder, tmp_path, shape, engine, where, on):
    torch.manual_seed(0)
    values = write_config(folder, tmp_path, *shape, max_batch_size=3, parallel={"tp_engine": engine})
    run_ranks(1, whole_run, values | {"parallel": {}})
    want = [record for record in steady(read(values["output"])) if record["id"] != "r2"]
    world = shape[0] * shape[1] * shape[2]
    many = run_ranks(world, run_with_fault, values, where, on, timeout_s=PATIENCE_S, fresh=True)
    have = steady(read(values["output"]))
    (lost,) = [record for record in have if record["id"] == "r2"]
    assert [record for record in have if record["id"] != "r2"] == want
    assert lost["error"].endswith("MemoryError: no room") and lost["text"] is None
    assert {(found.num_ok, found.num_failed) for found, _ in many} == {(4, 2)}
