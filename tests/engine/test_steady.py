"""Numbers of rows for which products give a row the same bits, whatever the processor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2o_dist.comm import Collectives, build_mesh
from d2o_dist.engine import steady
from d2o_dist.engine.steady import MULTIPLES, agreed_rows, is_steady, steady_rows
from tests.models import tiny_model
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    monkeypatch.setattr(steady, "_found", {})
    steady._warn.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("wide", "out"), [(64, 128), (48, 33), (96, 64), (576, 192)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_has_the_same_bits_beside_all_numbers_of_rows(dtype, wide, out, bias, caplog):
    """Also beside others, of numbers that were not tried."""
    torch.manual_seed(1)
    layer, row = nn.Linear(wide, out, bias, dtype=dtype), torch.randn(wide, dtype=dtype)
    multiple = steady_rows(layer)
    if None in steady._found.values():
        assert "last bits" in caplog.text
        pytest.skip("this processor has no such number, and it was said")
    want = layer(row.expand(multiple, 1, wide).contiguous())[0, 0]
    for rows in range(multiple, 97, multiple):
        for place in {*range(0, rows, 5), rows - 1}:
            batch = torch.randn(rows, 1, wide, dtype=dtype)
            batch[place] = row
            assert torch.equal(layer(batch)[place, 0], want), (multiple, rows, place)


def by_rows(change):
    """A product of which nothing counts but the number of rows, as `change` says."""

    def product(x, weight, bias=None):
        return torch.full((*x.shape[:-1], len(weight)), float(change(len(x))))

    return product


@pytest.mark.parametrize(("bound", "want"), [(0, 4), (8, 8), (9, 16), (16, 16), (17, 32)])
def test_the_smallest_multiple_beyond_the_bound_where_kernels_change(monkeypatch, bound, want):
    monkeypatch.setattr(steady, "linear", by_rows(lambda rows: rows < bound))
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    assert steady_rows(model) == want
    assert len(steady._found) == 2, "weights of the two products alone"


def test_no_multiple_is_said(monkeypatch, caplog):
    monkeypatch.setattr(steady, "linear", by_rows(lambda rows: rows))
    assert steady_rows(nn.Linear(8, 4)) == steady_rows(nn.Linear(8, 4)) == MULTIPLES[-1]
    assert caplog.text.count("(4, 8)") == 1 and "last bits" in caplog.text


def test_a_place_counts(monkeypatch):
    def product(x, weight, bias=None):
        return (torch.arange(len(x)) == 11).float()[:, None, None] * (len(x) == 12)

    monkeypatch.setattr(steady, "linear", product)
    layer = nn.Linear(8, 4)
    assert not is_steady(layer.weight, layer.bias, 4) and is_steady(layer.weight, layer.bias, 8)
    assert steady_rows(layer) == 8


def multiples(rank, world):
    """What a rank finds for itself, and what all take: the second rank needs more rows."""
    steady.linear, steady._found = by_rows(lambda rows: rows < (0, 16)[rank]), {}
    model, ranks = tiny_model(), Collectives(build_mesh(sp=world).axis("request"))
    return steady_rows(model), agreed_rows(model, model.device, ranks)


@pytest.mark.multirank
def test_ranks_take_steps_of_one_shape():
    assert run_ranks(2, multiples, fresh=True) == [(4, 16), (16, 16)]
