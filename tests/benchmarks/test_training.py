"""The benchmark of a step runs, and draws what it measured."""

import pytest

from benchmarks import training


def test_cases_are_measured_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    small = {**training.SHAPE, "num_hidden_layers": 2, "hidden_size": 48, "vocab_size": 64}
    monkeypatch.setattr(training, "SHAPE", small)
    results = [training.run_case(name, 256, name == "d2o_lm", 0.2, 1) for name in training.OBJECTIVES]
    assert [row["objective"] for row in results] == list(training.OBJECTIVES)
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["peak_mib"] > 0 for row in results)
    training.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
