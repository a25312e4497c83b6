"""Whole runs on a tiny model folder: failures of rows, of batches and of the user's patience."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from d2o_dist.config.infer import InferConfig
from d2o_dist.engine import plan
from d2o_dist.engine import runner as running
from d2o_dist.engine.lock import OutputLock
from d2o_dist.engine.loop import Running
from d2o_dist.engine.output import lock_path
from d2o_dist.engine.plan import prepare
from d2o_dist.engine.runner import run
from d2o_dist.models import loading
from tests.engine.tiny import MAX_POSITIONS, make_folder, make_tokenizer
from tests.models import tiny_model

WORDS = "the quick brown fox jumps over the lazy dog and folds the rest into a cache".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_config(folder, tmp_path, rows, **fields) -> InferConfig:
    values = {
        "model": str(folder),
        "prompts": write_rows(tmp_path / "p.jsonl", rows),
        "output": str(tmp_path / "out.jsonl"),
        "d2o": {"keep_ratio": 0.4, "budget": {"min_layers": 0, "min_layer_tokens": 8}},
        "sampling": {"max_new_tokens": 6},
        "device": "cpu",
        **fields,
    }
    return InferConfig.from_dict(values)


ROWS = [{"id": f"r{n}", "prompt": " ".join(WORDS[: 3 + 5 * n % 13])} for n in range(7)]
MIXED = [{**row, "max_new_tokens": (6, 2, 9, 1, 5, 12, 3)[n]} for n, row in enumerate(ROWS)]


def read(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_results_are_in_the_order_of_the_input_and_do_not_depend_on_the_batches(folder, tmp_path):
    sampling = {"max_new_tokens": 6, "temperature": 0.9, "seed": 3}
    texts = []
    for size in (3, 1):
        config = make_config(folder, tmp_path, MIXED, max_batch_size=size, sampling=sampling, overwrite=True)
        counts: list[int] = []
        summary = run(config, prepare(config), on_rows=counts.append)
        records = read(tmp_path)
        assert [record["id"] for record in records] == [row["id"] for row in ROWS]
        assert (summary.num_ok, summary.num_failed, sum(counts)) == (7, 0, 7)
        assert all(record["held_bytes"] < record["full_bytes"] for record in records)
        texts.append([record["text"] for record in records])
    assert texts[0] == texts[1]


def test_bad_rows_beside_good_ones(folder, tmp_path):
    rows = [ROWS[0], {"id": "bad"}, {"id": "long", "prompt": "fox " * 400}, ROWS[1]]
    config = make_config(folder, tmp_path, rows)
    summary = run(config, prepare(config))
    errors = [record["error"] for record in read(tmp_path)]
    assert errors[0] is None and errors[3] is None and "neither prompt nor messages" in errors[1]
    assert f"together above the model's max_position_embeddings ({MAX_POSITIONS})" in errors[2]
    assert (summary.num_ok, summary.num_failed) == (2, 2)


def test_without_a_good_row_no_weights_are_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("loaded"))
    config = make_config(folder, tmp_path, [{"id": "bad"}])
    assert run(config, prepare(config)).num_failed == 1


def failing(monkeypatch, decide):
    """Make the reading of prompts raise what `decide(requests)` returns, if anything."""
    real = running.InferRunner.read

    def read(self, requests):
        if (error := decide(requests)) is not None:
            raise error
        return real(self, requests)

    monkeypatch.setattr(running.InferRunner, "read", read)


def test_a_failed_batch_is_tried_row_by_row(folder, tmp_path, monkeypatch):
    real = Running.step

    def step(self):
        if len(self.going) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(self)

    monkeypatch.setattr(Running, "step", step)
    lines: list[str] = []
    config = make_config(folder, tmp_path, ROWS, max_batch_size=4)
    assert run(config, prepare(config), log=lines.append).num_ok == 7
    assert any("failed (OutOfMemoryError: no room); its rows are tried one by one" in line for line in lines)


def test_a_row_that_fails_alone_has_an_error_and_the_rest_goes_on(folder, tmp_path, monkeypatch):
    failing(monkeypatch, lambda requests: ValueError("odd") if any(r.id == "r2" for r in requests) else None)
    lines: list[str] = []
    config = make_config(folder, tmp_path, ROWS, max_batch_size=3)
    summary = run(config, prepare(config), log=lines.append)
    assert (summary.num_ok, summary.num_failed) == (6, 1)
    assert read(tmp_path)[2]["error"] == "ValueError: odd"
    assert "row 2 ('r2') failed: ValueError: odd" in lines


def test_an_interruption_keeps_what_is_written(folder, tmp_path, monkeypatch):
    seen = []

    def decide(requests):
        seen.append(requests)
        return KeyboardInterrupt() if len(seen) == 5 else None

    failing(monkeypatch, decide)
    config = make_config(folder, tmp_path, [*ROWS, {"id": "bad"}], max_batch_size=2)
    summary = run(config, prepare(config))
    records = read(tmp_path)
    assert summary.interrupted and len(records) == 5 and summary.num_missing == 3
    assert [r["index"] for r in records] == sorted(r["index"] for r in records)


def test_what_the_user_did_not_foresee_keeps_what_is_written(folder, tmp_path, monkeypatch):
    calls = []

    def decide(requests):
        calls.append(requests)
        return SystemExit(3) if len(calls) == 5 else None

    failing(monkeypatch, decide)
    config = make_config(folder, tmp_path, ROWS, max_batch_size=4)
    with pytest.raises(SystemExit):
        run(config, prepare(config))
    assert len(read(tmp_path)) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": "nowhere.jsonl"}, "prompts file nowhere.jsonl does not exist"),
        ({"model": "./nowhere"}, "model folder ./nowhere does not exist"),
        ({"device": "cuda:77"}, r"device \(cuda:77\) is not there: this machine has \d+ CUDA devices"),
        ({"stream": True}, r"stream \(true\) shows one prompt, but there are 7"),
        ({"d2o": {"keep_ratio": 0.2, "budget": {"protected_layers": [0]}}}, "the 1 protected layers and budget.min"),
        ({"decode_graph": "always", "device": "cpu"}, r"decode_graph \(always\) is impossible: the model is on cpu"),
        ({"d2o": {"budget": {"protected_layers": [9]}}}, "protected_layers has 9, but the model has 2 layers"),
    ],
)
def test_refusals_before_any_weight_is_loaded(folder, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        prepare(make_config(folder, tmp_path, ROWS, **fields))


def test_no_graph_on_a_gpu_is_told(folder, tmp_path, monkeypatch):
    """On a CPU nobody expects one."""
    told = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(plan, "pick_device", lambda name, device=device: torch.device(device))
        monkeypatch.setattr(plan, "check_graph", lambda *args: "reasons")
        told[device] = prepare(make_config(folder, tmp_path, ROWS)).warnings
    assert told == {"cpu": [], "cuda": ["decode steps are run by Python, not as a CUDA graph: reasons"]}


def test_folders_that_lack_something(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=f"the configuration of {empty} cannot be loaded"):
        prepare(make_config(empty, tmp_path, ROWS))
    (empty / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=f"the tokenizer of {empty} cannot be loaded"):
        prepare(make_config(empty, tmp_path, ROWS))
    make_tokenizer().save_pretrained(empty)
    config = make_config(empty, tmp_path, [{"id": "bad"}, *ROWS])
    with pytest.raises(ValueError, match=f"the weights of {empty} cannot be loaded"):
        run(config, prepare(config))
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ValueError, match="model folder .*config.json is not a folder"):
        prepare(make_config(empty / "config.json", tmp_path, ROWS))


def test_repeated_ids_are_reported(folder, tmp_path):
    plan = prepare(make_config(folder, tmp_path, [ROWS[0], ROWS[0]]))
    assert plan.warnings == ["1 ids are used more than once, such as 'r0': tell rows apart by their index"]


def test_special_ids(folder):
    model, tokenizer = tiny_model(), make_tokenizer()
    model.generation_config.eos_token_id = [4, 5]
    assert loading.eos_ids(loading.adapt(model), tokenizer) == {1, 4, 5} and loading.pad_id(tokenizer) == 2
    assert loading.pad_id(make_tokenizer(pad=False)) == 1
    model.generation_config.eos_token_id = 7
    assert loading.eos_ids(loading.adapt(model), tokenizer) == {1, 7}
    model.generation_config.eos_token_id = None
    assert loading.eos_ids(loading.adapt(model), tokenizer) == {1}


def test_auto_is_float32_for_a_half_precision_checkpoint_on_a_cpu(folder, tmp_path):
    model = loading.load_model(InferConfig(model=str(folder), device="cpu")).model.bfloat16()
    model.save_pretrained(tmp_path / "half")
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        config = InferConfig(model=str(tmp_path / "half"), dtype=dtype, device="cpu")
        assert loading.load_model(config).model.dtype == expected


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_dtype(folder, dtype):
    model = loading.load_model(InferConfig(model=str(folder), dtype=dtype, device="cpu")).model
    assert model.dtype == (torch.float64 if dtype == "auto" else torch.float32)
    assert not model.training and model.config._attn_implementation == "d2o"


def test_one_run_at_a_time_writes_to_an_output(folder, tmp_path):
    config = make_config(folder, tmp_path, ROWS[:2])
    plan = prepare(config)
    held = OutputLock(config.output, lock_path(config.output))
    with pytest.raises(ValueError, match=r"output .*out.jsonl is written by process \d+ on"):
        run(config, plan)
    held.release()
    assert not (tmp_path / "out.jsonl").exists()
    run(config, plan)
    done = read(tmp_path)
    # Planned before the other run ended: its results are not replaced unasked.
    with pytest.raises(ValueError, match="exists: delete it, name another, or set overwrite=true"):
        run(dataclasses.replace(config, resume=False), plan)
    assert read(tmp_path) == done and len(done) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.job", "p.jsonl"]
