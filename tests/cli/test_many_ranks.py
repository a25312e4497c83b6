"""`infer` as ranks of one job: who speaks, and the status of each."""

from __future__ import annotations

import json

import pytest

from d2o_dist.cli import infer
from tests.cli.speak import speak
from tests.engine.tiny import make_folder
from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank
SMALL = ["d2o.budget.min_layer_tokens=8", "sampling.max_new_tokens=5", "device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=4096))


def run_infer(rank, world, argv):
    return speak(infer.main, argv)


def test_one_prompt_streams_on_rank_0(folder):
    argv = ["--model", folder, "--prompt", "one two three four five", "--sp", "2", "stream=true", *SMALL]
    (alone,) = run_ranks(1, run_infer, [*argv, "parallel.sp=1"])
    first, second = run_ranks(2, run_infer, argv)
    assert alone[0] == first[0] == second[0] == 0
    text = alone[1].split("\n\nkeep ratio")[0]
    assert text and first[1].startswith(f"{text}\n\nkeep ratio") and "layer kind" in first[1]
    assert second[1:] == ("", "") and "rows: 1 ok" in first[2] and "on each of 2 ranks" in first[2]


def test_failed_rows_are_the_status_of_all_ranks(folder, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "one two"}\nnope\n{"prompt": "the lazy dog"}\n')
    first, second = run_ranks(2, run_infer, ["--model", folder, "--prompts", str(prompts), "--sp=2", *SMALL])
    assert (first[0], second[0]) == (1, 1) and second[1:] == ("", "")
    assert sorted(json.loads(line)["index"] for line in first[1].splitlines()) == [0, 1, 2]
    assert first[2].count("warning: row 1 (1): line 2: not valid JSON") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts", "nowhere.jsonl"], "error: prompts file nowhere.jsonl does not exist"),
        (["--prompt", "x", "--dp", "2"], "error: 2 replicas (dp) write their results to part files"),
        (["--prompt", "x", "--tp", "2", "parallel.tp_engine=transformers", "d2o.budget.protected_layers=[9]"],
         "error: budget.protected_layers has 9"),
        (["--prompt", "x", "--sp", "2", "--trace", __file__], "error: trace folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once(folder, argv, message):
    first, second = run_ranks(2, run_infer, ["--model", folder, *argv, *SMALL])
    assert (first[0], second[0]) == (2, 2)
    assert message in first[2] and first[2].count("\n") == 1 and first[1] + second[1] + second[2] == ""
