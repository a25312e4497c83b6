"""A prompt whose layers are evicted in steps, until all shares are known: against loops over Python lists."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from d2o_dist.cache.compress import HEADROOM, TRIM_TO, Compression
from d2o_dist.engine.session import Session
from tests.core.naive import assert_row_equals, naive_compress, naive_order, to_lists
from tests.models import left_padded, tiny_model
from tests.spec import flat, spec

CASES = {
    "reach": {},
    "a tail that is longer than what is spare": {"tail_fraction": 0.5},
    "into all that is kept": {"merge_targets": "kept"},
    "threshold": {"gate": "threshold"},
    "drop": {"merge": "none"},
    "average": {"merge": "keys_values", "merge_targets": "tail", "selection": "mixed"},
    "accumulated": {"selection": "cumulative", "heavy_fraction": 0.5},
    "shares apart": {"temperature": 0.5},  # some layers lack slots
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_loops(case, monkeypatch):
    fields = {"keep_ratio": 0.3, "min_layer_tokens": 8, "temperature": 20.0, "eviction_interval": None} | CASES[case]
    lengths = (120, 77)
    before, steps = {}, defaultdict(list)
    close, evict = Compression._close, Compression._evict

    def note_slots(self, layer):
        slots = layer.blocks[0].store.slots
        before[len(before)] = [to_lists(slots, row) for row in range(len(lengths))]
        close(self, layer)

    def note_budgets(self, layers, factor=None):
        for index, layer in layers.items():
            steps[index].append((factor, list(layer.slot_budgets)))
        evict(self, layers, factor)

    monkeypatch.setattr(Compression, "_close", note_slots)
    monkeypatch.setattr(Compression, "_evict", note_budgets)
    session = Session(tiny_model(num_hidden_layers=6), spec("reach", **fields), reading="layerwise")
    session.prefill(*left_padded(list(lengths)))

    assert any(session.cache.report().num_short_slots) == (case == "shares apart")
    rules = flat("reach", **fields)
    for index, layer in enumerate(session.cache.compressed.layers):
        assert [factor for factor, _ in steps[index]] == [HEADROOM, *[TRIM_TO] * (index < 4), None]
        for row in range(len(lengths)):
            lists, tau = before[index][row], None
            order = naive_order(lists, rules, finalize=True)
            for factor, budgets in steps[index]:
                at_this = SimpleNamespace(**vars(rules))
                if factor is not None:  # the heavy slots that are expected to go with the next step take in
                    at_this.tail_fraction = max(rules.tail_fraction, (1 - 1 / factor) * rules.heavy_fraction)
                heavy = int(rules.heavy_fraction * budgets[row] + 1e-9)
                lists, tau = naive_compress(
                    lists, heavy, budgets[row] - heavy, tau, at_this,
                    finalize=True, order=order, is_last=factor is None,
                )  # fmt: skip
            assert_row_equals(layer.blocks[0].store.slots, row, lists)
