"""The GPU check as far as a CPU goes: interpreted checks, timings of tiny layers, and what it does when things fail."""

import json
import time

import pytest
import torch

from benchmarks import gpu_check, layers
from benchmarks.groups import GROUPS
from d2o_dist.kernels.registry import OPS

TINY = ["--heads", "2/1", "--head-dim", "16", "--length", "340", "--reps", "1", "--threads", "1"]


def soon() -> float:
    return time.monotonic() + 120


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_checks_run_in_processes_of_their_own(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows, problems = gpu_check.run_checks(["finish_decode"], "cpu", soon())
    assert problems == []
    (row,) = rows
    assert (
        row["op"] == "finish_decode"
        and row["checks"] == row["right"] == 6
        and "of 2e-02" in row["nearest to its limit"]
    )


def test_a_failure_hides_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # checks on a CPU refuse to run
    rows, problems = gpu_check.run_checks(["finish_decode"], "cpu", soon())
    assert [row["right"] for row in rows] == [0]
    (problem,) = problems
    assert "after 0 of 6 checks: exit status 2" in problem and "TRITON_INTERPRET=1" in problem


def test_whatever_happens_to_a_process_the_others_are_reported(monkeypatch, tmp_path):
    """One is killed in the middle of a line, after bytes that are no text; one finds an error; one hangs."""
    right = '{"op": "finish_decode", "name": "scores", "right": true, "errors": {"x": [0.5, 1]}}'
    wrong = '{"op": "merge_into", "name": "one", "right": false, "traceback": "illegal memory access"}'
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\ncase $* in\n"
        f"*finish_decode*) printf '%s\\n\\377\\n{{}}\\n{{\"op\": \"upd' '{right}'; kill -9 $$;;\n"
        f"*merge_into*) echo '{wrong}'; exit 1;;\n"
        f"*) printf '\\377'; exec sleep 60;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(program))
    ops = ["finish_decode", "merge_into", "decode_attention"]
    rows, problems = gpu_check.run_checks(ops, "cuda", time.monotonic() + 5)
    assert [(row["op"], row["right"]) for row in rows] == [(ops[0], 1), (ops[1], 0), (ops[2], 0)]
    assert problems[0].startswith("finish_decode, after 1 of 6 checks: exit status -9")
    assert problems[1] == "merge_into one: illegal memory access"
    assert problems[2].startswith("merge_into, after 1 of ") and "exit status 1" in problems[2]
    assert "decode_attention, after 0 of " in problems[3] and "no time left" in problems[3] and len(problems) == 4


def test_no_time_left_is_a_problem():
    rows, problems = gpu_check.run_checks(["finish_decode"], "cpu", time.monotonic() - 1)
    assert rows[0]["right"] == 0 and "no time left" in problems[0]
    assert "no time left" in gpu_check.run_timings({"tiny": TINY}, ["decode"], "cpu", time.monotonic() - 1)[2][0]


def test_what_hangs_is_stopped():
    output, failure = gpu_check.run_module(
        "timeit", ["-n1", "-r1", "import time; time.sleep(60)"], time.monotonic() + 1
    )
    assert output == "" and "stopped after 1 s" in failure


def test_timings_of_tiny_layers():
    rows, targets, problems = gpu_check.run_timings({"tiny": TINY}, ["decode"], "cpu", soon())
    assert problems == []
    assert rows[0]["case"] == "SDPA, full cache" and rows[0]["of the first"] == "1.000x" and rows[0]["copy GB/s"] > 0
    assert {row["shape"] for row in rows} == {"tiny, 2/1 x 16, 340 tokens, float32"}
    assert [row["target"] for row in targets] == ["<= 0.286x"] * 2


def test_main_reports_problems_and_fails(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(gpu_check, "run_checks", lambda *a: ([{"op": "x", "right": 0}], ["x one: wrong"]))
    monkeypatch.setattr(gpu_check, "run_timings", lambda *a: ([], [], ["decode: failed"]))
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert "2 problems" in (said := capsys.readouterr().out) and "| passed over |" in said
    (report,) = tmp_path.glob("*-gpu-check.json")
    values = json.loads(report.read_text())
    assert values["facts"]["problems"] == ["x one: wrong", "decode: failed"]
    assert {row["op"] for row in values["more"][-1]} == set(OPS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_gates_and_reports(tmp_path, capsys, dtype):
    assert layers.main([*TINY, "--dtype", dtype, "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*-layer-prefill-decode-evict.json")
    values = json.loads(report.read_text())
    assert {row["group"] for row in values["rows"]} == set(GROUPS) and len(values["more"][0]) == 6
    assert "| target |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "group, broken", [("prefill", "scored_prefill_attention"), ("decode", "finish_decode"), ("evict", "nearest_kept")]
)
def test_a_red_gate_times_nothing(monkeypatch, group, broken):
    from benchmarks import groups

    original = getattr(groups, broken)

    def wrong(*args, **kwargs):
        if broken == "finish_decode":
            return None
        first, *rest = original(*args, **kwargs)
        return (first + 1, *rest)

    monkeypatch.setattr(groups, broken, wrong)
    monkeypatch.setattr(layers, "interleaved_medians", lambda *args: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=f"gate of {group} is red"):
        layers.main([*TINY, "--groups", group])


def test_unknown_group_and_absent_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["--groups", "prefil"], ["--device", "cuda"]):
        with pytest.raises(SystemExit):
            layers.main(arguments)
    assert "'prefil'" in (said := capsys.readouterr().err) and "no CUDA device" in said
