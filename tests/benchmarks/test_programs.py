"""The benchmark programs on tiny shapes: what they write, and what they refuse."""

import json

import pytest
import torch

from benchmarks import largest, lengths, model, roofline
from benchmarks.__main__ import BENCHMARKS
from benchmarks.__main__ import main as run
from benchmarks.timing import interleaved_medians

TINY = ["--model", "tiny", "--length", "100", "--steps", "3", "--dtype", "float32", "--device", "cpu"]


def test_benchmarks_are_listed_and_unknown_ones_refused(capsys):
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BENCHMARKS)
    assert run(["prefll"]) == 2
    assert "no benchmark 'prefll'" in capsys.readouterr().err


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_tells_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as end:
        run([name, "--help"])
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


def test_lengths_writes_a_plot(tmp_path):
    arguments = [
        "lengths",
        "--lengths",
        "320,640,700",
        "--prefill-to",
        "640",
        "--heads",
        "2/1",
        "--head-dim",
        "16",
        "--reps",
        "1",
        "--threads",
        "1",
    ]
    assert run([*arguments, "--clock", "cpu", "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*-lengths.json")
    rows = json.loads(report.read_text())["rows"]
    assert [row["T"] for row in rows] == [320, 640, 700]
    assert [row["attention, ms"] == "not measured" for row in rows] == [False, False, True]
    assert rows[2]["column sums of prompt"] == "not measured" and float(rows[2]["whole step, ms"]) > 0
    assert report.with_suffix(".png").stat().st_size > 5000
    shares = [float(rows[0][f"{name} of prompt"].rstrip("%")) for name in lengths.PROMPT]
    assert abs(sum(shares) - 100) <= 2


def test_model_compares_caches(tmp_path):
    assert run(["model", *TINY, "--batches", "1,2", "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*-model.json")
    rows = json.loads(report.read_text())["rows"]
    assert [(row["batch"], row["cache"]) for row in rows] == [
        (b, c) for b in (1, 2) for c in ("sdpa", "full", "d2o", "lean")
    ]
    held = {row["cache"]: float(row["KV cache, MiB"]) for row in rows[4:]}
    assert held["sdpa"] == held["full"] > 2 * held["d2o"]


def test_rows_that_come_and_go_take_fewer_steps(tmp_path):
    arguments = ["jobs", "--rows", "10", "--prompts", "4", "40", "--answers", "1", "30", "--max-batch-size", "3"]
    assert run([*arguments, "--dtype", "float64", "--presets", "d2o,full", "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*-jobs.json")
    rows = json.loads(report.read_text())["rows"]
    assert [(row["cache"], row["rows"]) for row in rows] == [
        (cache, rows) for cache in ("d2o", "full") for rows in ("fixed batches", "come and go")
    ]
    assert all(row["rows of the same tokens"] == "10 of 10" and row["rows at once (most)"] <= 3 for row in rows)
    assert rows[1]["steps"] < rows[0]["steps"] and rows[3]["steps"] < rows[2]["steps"]


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


@pytest.mark.parametrize("most", [1, 7, 8, 100])
@pytest.mark.parametrize("answer", [0, 1, 2, 3, 7, 8, 33, 100, 200])
def test_the_largest_batch_is_found(answer, most):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        assert 1 <= batch <= most
        return batch <= answer

    assert largest.largest_batch(fits, most) == min(answer, most)
    assert len(tried) <= 2 * max(answer, 1).bit_length() + 1 and len(set(tried)) == len(tried)


def test_more_rows_fit_and_all_are_counted(tmp_path, capsys):
    arguments = ["largest", *TINY[:4], "--steps", "3", *TINY[6:], "--limit-mib", "2", "--most", "64", "--threads", "1"]
    assert run([*arguments, "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*-largest.json")
    rows = json.loads(report.read_text())["rows"]
    assert [(row["batch"], row["cache"]) for row in rows] == [
        (where, cache) for where in ("1", "largest of sdpa", "its own largest") for cache in ("sdpa", "d2o", "lean")
    ]
    by = {(row["batch"], row["cache"]): row for row in rows}
    full, ours = by["its own largest", "sdpa"], by["its own largest", "d2o"]
    # 2 layers x 2 KV heads x 16 dims x (keys, values) x 4 bytes = 512 bytes a token; 103 tokens in the end.
    weights = sum(p.numel() * 4 for p in model.build_model("tiny", None, torch.float32, "cpu").parameters())
    assert full["rows"] == ((2 << 20) - weights) // (512 * 103)
    assert by["largest of sdpa", "d2o"]["rows"] == full["rows"] < ours["rows"]
    assert weights + float(ours["cache, MiB"]) * 2**20 <= (2 << 20) + 2**17


def test_what_does_not_fit_at_all_is_said(monkeypatch, capsys):
    def crowded(self, batch, steps):
        if self.preset == "sdpa":
            raise torch.OutOfMemoryError("full")
        return 1.0, 1 << 20

    monkeypatch.setattr(largest.Trial, "_decode", crowded)
    assert largest.main([*TINY, "--limit-mib", "64", "--most", "2", "--presets", "sdpa,d2o"]) == 0
    printed = capsys.readouterr().out
    assert "| tiny | 100 | sdpa | its own largest | 0 | does not fit |" in printed
    assert "| tiny | 100 | d2o | its own largest | 2 | 6.00 |" in printed


def test_a_cpu_needs_a_limit(capsys):
    with pytest.raises(SystemExit):
        largest.main(TINY)
    assert "--limit-mib is needed on a CPU" in capsys.readouterr().err


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
