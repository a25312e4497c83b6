import json

import pytest
import torch

from d2o_dist.bench import memory, prefill
from d2o_dist.bench.layer import DecodeLayer, finalize_layer, random_slots
from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core import compress


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
    budgets, choose = [], compress.choose

    def noted(slots, budget, *args, **kwargs):
        budgets.append(budget)
        return choose(slots, budget, *args, **kwargs)

    monkeypatch.setattr(compress, "choose", noted)
    config = D2OConfig.preset("d2o", keep_ratio=0.2)
    layer = DecodeLayer.full(config, (4, 2), 300, 16, torch.float32, "cpu")
    for _ in range(2):
        layer.fill()
        layer.evict()
        assert layer.layer.kv_len == [60]
    assert finalize_layer(random_slots(2, 300, 16, torch.float32, "cpu"), config).positions.shape[-1] == 60
    assert [(one.most_kept, one.most_evicted) for one in budgets] == [(60, 16), (60, 16), (60, 240)]
