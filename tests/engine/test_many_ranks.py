"""Whole runs on meshes of real ranks: the records of one process."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from d2o_dist.comm import build_mesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine import runner as running
from d2o_dist.engine.plan import prepare
from d2o_dist.engine.runner import run
from d2o_dist.models.hf import loading as hf
from tests.engine.tiny import make_folder
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.multirank
WORDS = "the quick brown fox jumps over the lazy dog and folds the rest into a cache".split()
# With limits of their own, so that rows join others that decode.
ROWS = [
    {"id": f"r{n}", "prompt": " ".join(WORDS * 3)[: 11 + 17 * n % 150], "max_new_tokens": (8, 3, 7, 2, 8)[n]}
    for n in range(5)
] + [{"id": "bad"}]

PATIENCE_S = 150.0  # a token costs several collectives, and each of them a turn on a busy machine
SHAPES = [(2, 1, 1), (3, 1, 1), (1, 2, 1), (1, 3, 1), (1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 2, 1)]

DEEPSPEED = (1, 2, 2, "deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"), num_attention_heads=8)


def write_config(folder, tmp_path, dp, sp, tp, **fields) -> dict:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model": str(folder),
        "prompts": str(prompts),
        "output": str(tmp_path / "out.jsonl"),
        "d2o": {"keep_ratio": 0.4, "budget": {"min_layers": 0, "min_layer_tokens": 8}},
        "sampling": {"max_new_tokens": 8, "temperature": 0.8, "seed": 5},
        "device": "cpu",
        "overwrite": True,
        "max_batch_size": 3,
        "parallel": {"dp": dp, "sp": sp, "tp": tp, "tp_engine": "transformers", **fields.pop("parallel", {})},
        **fields,
    }


def read(output) -> list[dict]:
    return [json.loads(line) for line in Path(output).read_text().splitlines()]


def whole_run(rank, world, values):
    config = InferConfig.from_dict(values)
    parallel = config.parallel
    mesh = build_mesh(parallel.replicas(world), parallel.sp, parallel.tp)
    counts: list[int] = []
    summary = run(config, prepare(config, mesh), mesh, on_rows=counts.append)
    return summary, sum(counts)


@pytest.mark.parametrize(("dp", "sp", "tp", "engine"), [*((*shape, "transformers") for shape in SHAPES), DEEPSPEED])
def test_the_records_are_those_of_one_process(folder, tmp_path, dp, sp, tp, engine):
    alone = write_config(folder, tmp_path, 1, 1, 1)
    ((summary, count),) = run_ranks(1, whole_run, alone)
    want = read(alone["output"])
    assert (summary.num_ok, summary.num_failed, count) == (5, 1, 6)
    # DTensor remembers a mesh of the same ranks from an earlier run in the same process, and its group, which is gone.
    fresh, values = tp > 1, write_config(folder, tmp_path, dp, sp, tp, parallel={"tp_engine": engine})
    many = run_ranks(dp * sp * tp, whole_run, values, timeout_s=PATIENCE_S, fresh=fresh)
    have = read(alone["output"])
    assert have == want and [record["index"] for record in have] == list(range(6))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out.jsonl", "out.jsonl.job", "p.jsonl"]
    assert len({str(found) for found, _ in many}) == 1  # one summary, on all ranks
    found = many[0][0]
    assert (found.num_ok, found.num_failed, found.held_bytes) == (5, 1, summary.held_bytes)
    assert len(found.rank_bytes) == dp * sp * tp
    # Two KV heads of two layers: a rank has its share, and room to grow; with tp 4 a head is on two ranks.
    if dp == 1:
        assert max(found.rank_bytes) < summary.rank_bytes[0] * (0.5 if sp * tp == 2 else 0.75) + 4096
    assert many[0][1] == 6  # rank 0's progress bar counts the rows of all replicas


@pytest.mark.parametrize(("sp", "tp"), [(2, 1), (1, 3)])
def test_prompts_that_are_read_twice(tmp_path, sp, tp):
    """With budgets of heads: the records, bytes among them, of one process."""
    folder = make_folder(tmp_path / "model", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    d2o = {"preset": "reread", "keep_ratio": 0.4, "budget": {"min_layer_tokens": 8}, "eviction_interval": 3}
    values = write_config(folder, tmp_path, 1, 1, 1, d2o=d2o)
    ((summary, _),) = run_ranks(1, whole_run, values)
    want = read(values["output"])
    assert summary.num_ok == 5
    values = write_config(folder, tmp_path, 1, sp, tp, d2o=d2o)
    many = run_ranks(sp * tp, whole_run, values, timeout_s=PATIENCE_S, fresh=tp > 1)
    assert read(values["output"]) == want
    assert {found.held_bytes for found, _ in many} == {summary.held_bytes}


def refused(rank, world, values):
    config = InferConfig.from_dict(values)
    with patch.object(running.loading, "load_model", None):  # no weights
        try:
            mesh = build_mesh(config.parallel.replicas(world), config.parallel.sp, config.parallel.tp)
            prepare(config, mesh)
        except ValueError as error:
            return str(error)


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ((1, 1, 1), {}, "world size (2) must equal dp (1) x sp (1) x tp (1) = 1"),
        ((None, 1, 3), {}, "world size (2) must be a multiple of sp (1) x tp (3) = 3"),
        ((1, 1, 2), {"kv": (6, 3)}, "num_key_value_heads (3) must be divisible by tp (2), or tp by"),
        ((1, 1, 2), {"kv": (9, 3)}, "num_attention_heads (9) must be divisible by tp (2)"),
        ((1, 2, 1), {"kv": (4, 1), "parallel": {"sp_prefill": "ulysses"}}, "a tensor rank has 1 and sp is 2"),
        ((2, 1, 1), {"output": None}, "2 replicas (dp) write their results to part files"),
        ((2, 1, 1), {"stream": True, "prompts": None, "prompt": "x"}, "shows the text of one replica, but there are 2"),
        ((2, 1, 1), {"max_prompt_tokens": 250}, "max_prompt_tokens (250) and max_new_tokens (8) are together above"),
        ((2, 1, 1), {"prompts": "nowhere.jsonl"}, "prompts file nowhere.jsonl does not exist"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_refusals_before_any_weight_is_loaded(folder, tmp_path, shape, fields, message):
    heads = fields.pop("kv", None)
    if heads is not None:
        folder = tmp_path / "model"
        size = 16 * heads[0]
        make_folder(folder, num_attention_heads=heads[0], num_key_value_heads=heads[1], hidden_size=size)
    values = write_config(folder, tmp_path, *shape, **{key: value for key, value in fields.items()})
    found = run_ranks(2, refused, values)
    assert found[0] == found[1] and message in found[0]


def failing_batch(rank, world, values):
    real = running.InferRunner.read

    def read(self, requests):
        if any(request.id == "r2" for request in requests):
            raise MemoryError("no room")
        return real(self, requests)

    with patch.object(running.InferRunner, "read", read):
        return whole_run(rank, world, values)


def test_replicas_alone_with_their_requests_try_rows_again(folder, tmp_path):
    values = write_config(folder, tmp_path, 2, 1, 1, max_batch_size=8)
    many = run_ranks(2, failing_batch, values, fresh=True)
    failed = {record["id"]: record["error"] for record in read(values["output"]) if record["error"]}
    assert failed.keys() == {"r2", "bad"} and failed["r2"] == "MemoryError: no room"
    assert (many[0][0].num_ok, many[1][0].num_failed) == (4, 2)


def test_weights_that_one_rank_lacks_end_all_ranks_alike(folder, tmp_path):
    values = write_config(folder, tmp_path, 2, 1, 1)
    with pytest.raises(RankError, match="AgreedError: rank 1: the weights of") as caught:
        run_ranks(2, without_weights, values, fresh=True)
    assert "rank 0, 1 of 2 raised" in str(caught.value) or str(caught.value).count("AgreedError: rank 1") == 2


def without_weights(rank, world, values):
    if rank == 1:

        def load(what, auto, name, **kwargs):
            if what == "weights":
                raise ValueError(f"the weights of {name} cannot be loaded: gone")
            return auto.from_pretrained(name, **kwargs)

        hf._load = load
    return whole_run(rank, world, values)
