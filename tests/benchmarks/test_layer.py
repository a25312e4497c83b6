import json

import pytest
import torch

from benchmarks import memory, prefill
from benchmarks.layer import DecodeLayer, finalize_layer, random_slots
from d2o_dist.evict import prompt
from d2o_dist.evict.arena import ArenaEvictions, DueBlocks
from tests.spec import spec


def test_prefill_reports_and_writes(tmp_path, capsys):
    prefill.main(["--lengths", "64", "--heads", "4/2", "--head-dim", "16", "--reps", "1", "--out", str(tmp_path)])
    assert "with column sums" in capsys.readouterr().out
    (report,) = tmp_path.glob("*.json")
    assert json.loads(report.read_text())["rows"][0]["T"] == 64


def test_prefill_refuses_to_time_wrong_results(monkeypatch):
    monkeypatch.setattr(prefill, "column_sums", lambda q, k, lse, scale, **kw: torch.zeros_like(lse))
    with pytest.raises(SystemExit, match="red"):
        prefill.main(["--lengths", "64", "--heads", "4/2", "--head-dim", "16"])


def test_memory_prints_json(capsys):
    memory.main(["--length", "256"])
    assert json.loads(capsys.readouterr().out)["mass_error"] < 1e-3


def test_evictions_are_timed_as_the_cache_runs_them(monkeypatch):
    """Which knows how many slots stay and go: to ask the device would be a wait that users do not have."""
    budgets, choose, due, run = [], prompt.choose, [], ArenaEvictions.run

    def noted(slots, budget, *args, **kwargs):
        budgets.append(budget)
        return choose(slots, budget, *args, **kwargs)

    def noted_run(self, blocks, *args):
        due.append(blocks)
        return run(self, blocks, *args)

    monkeypatch.setattr(prompt, "choose", noted)
    monkeypatch.setattr(ArenaEvictions, "run", noted_run)
    config = spec("d2o", keep_ratio=0.2)
    layer = DecodeLayer.full(config, (4, 2), 300, 16, torch.float32, "cpu")
    for _ in range(2):
        layer.fill()
        layer.evict()
        assert layer.block.kv_len == [60]
    assert finalize_layer(random_slots(2, 300, 16, torch.float32, "cpu"), config).positions.shape[-1] == 60
    assert [(one.most_kept, one.most_evicted) for one in budgets] == [(60, 240)]
    assert due == [DueBlocks(blocks=(0,), surplus=(16,), slots=(60,))] * 2


def test_steps_of_a_layer_store_and_evict_as_the_cache_does():
    """What is repeated without its end changes nothing but its slot; what is full is evicted, the oldest first here."""
    config = spec("streaming", keep_ratio=0.2)
    layer, reference = (DecodeLayer.full(config, (4, 2), 300, 16, torch.float32, "cpu") for _ in range(2))
    q, k, v = torch.randn(1, 4, 1, 16), *torch.randn(2, 1, 2, 1, 16)
    for _ in range(3):
        layer.attend(q, k, v)
    old = layer.block.store.slots.positions[0, 0].tolist()
    for count in range(1, 36):
        torch.testing.assert_close(layer.step(q, k, v), reference.step(q, k, v))
        assert layer.seen == 300 + count and layer.block.kv_len == [60 + count % 16]
    slots = layer.block.store.slots
    assert old[:2] == [0, 5] and slots.positions[0].tolist() == [[0, *old[-27:], *range(300, 335)]] * 2
    assert torch.equal(slots.keys[:, :, -1:], k) and torch.equal(slots.values[:, :, -1:], v)
    layer.fill()
    assert (
        layer.block.kv_len == [76]
        and layer.block.store.slots.positions[0, :, -16:].tolist() == [list(range(332, 348))] * 2
    )
