"""The benchmark programs on tiny shapes: what they write, and what they refuse."""

import json

import pytest
import torch

from d2o_dist.bench import lengths, model, roofline
from d2o_dist.bench.__main__ import BENCHMARKS
from d2o_dist.bench.__main__ import main as bench
from d2o_dist.bench.timing import interleaved_medians

TINY = ["--model", "tiny", "--length", "100", "--steps", "3", "--dtype", "float32", "--device", "cpu"]


def test_benchmarks_are_listed_and_unknown_ones_refused(capsys):
    assert bench(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BENCHMARKS)
    assert bench(["prefll"]) == 2
    assert "no benchmark 'prefll'" in capsys.readouterr().err


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_tells_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as end:
        bench([name, "--help"])
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


def test_lengths_writes_a_plot(tmp_path):
    arguments = [
        "lengths",
        "--lengths",
        "320,640",
        "--heads",
        "2/1",
        "--head-dim",
        "16",
        "--reps",
        "1",
        "--threads",
        "1",
    ]
    assert bench([*arguments, "--clock", "cpu", "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*-lengths.json")
    rows = json.loads(report.read_text())["rows"]
    assert [row["T"] for row in rows] == [320, 640]
    assert report.with_suffix(".png").stat().st_size > 5000
    shares = [float(rows[0][f"{name} of prompt"].rstrip("%")) for name in lengths.PROMPT]
    assert abs(sum(shares) - 100) <= 2


def test_model_compares_caches(tmp_path):
    assert bench(["model", *TINY, "--batches", "1,2", "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*-model.json")
    rows = json.loads(report.read_text())["rows"]
    assert [(row["batch"], row["cache"]) for row in rows] == [
        (b, c) for b in (1, 2) for c in ("sdpa", "full", "d2o", "mass")
    ]
    held = {row["cache"]: float(row["KV cache, MiB"]) for row in rows[4:]}
    assert held["sdpa"] == held["full"] > 2 * held["d2o"]


def test_model_refuses_to_time_wrong_results(monkeypatch):
    monkeypatch.setattr(model, "GATE_LIMIT", {torch.float32: -1.0})
    with pytest.raises(SystemExit, match="gate is red"):
        model.main(TINY)


def test_model_reports_what_does_not_fit(monkeypatch, capsys):
    original = model.measure

    def crowded(loaded, preset, keep_ratio, batch, *rest):
        if batch > 1:
            raise torch.OutOfMemoryError("full")
        return original(loaded, preset, keep_ratio, batch, *rest)

    monkeypatch.setattr(model, "measure", crowded)
    assert model.main([*TINY, "--batches", "1,9", "--presets", "sdpa"]) == 0
    assert "| 9 | sdpa | out of memory |" in capsys.readouterr().out


def test_ceilings_and_work():
    ceilings = roofline.measure_ceilings("cpu", torch.float32, copy_mib=1, size=64)
    assert ceilings.copy_bytes > 0 and ceilings.matmul_flops > 0
    # One KV head of 2 x 3 slots x 4 dims in 2 bytes; 8 heads: 4 operations a slot, dim and head.
    assert roofline.decode_work((8, 1), 4, 3, 2) == roofline.Work(48, 384)
    assert roofline.prefill_work((2, 1), 4, 3, 2).flops == 4 * 2 * 6 * 4
    share = roofline.Work(50.0, 10.0).share(2.0, roofline.Ceilings(100.0, 50.0))
    assert share == {"% of copy": "25", "% of matmul": "10"}


def test_processor_time_does_not_count_waiting():
    import time

    waited = interleaved_medians({"sleep": lambda: time.sleep(0.05)}, 1, "cpu")["sleep"]
    assert waited < 0.05 <= interleaved_medians({"sleep": lambda: time.sleep(0.05)}, 1)["sleep"]
