import json

import pytest
import torch

from d2o_dist.bench import memory, prefill


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
