"""Going on: what must be as it was, what need not be, and from which checkpoint; with real runs where it matters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from d2o_dist.cli.train import main
from d2o_dist.comm import Collectives, ParallelMesh
from d2o_dist.config.train import TrainConfig
from d2o_dist.fields.overrides import apply_overrides
from d2o_dist.train import loop
from d2o_dist.train.checkpoints import Checkpoints, RunState
from d2o_dist.train.loop import train
from d2o_dist.train.resume import MAY_DIFFER, MEASURED_BY, UNREAD, differences, go_on, make_facts
from tests.train.runs import LM, make_config, make_inputs, records, run_whole, start
from tests.train.test_runs import command, losses


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs) -> Path:
    """The output of a run of four steps, of which the second was measured best."""
    values = iter((9.0, 3.0, 1.0, 2.0, 4.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "headline", lambda *args: next(values))
        run_whole(make_config(inputs, "finished", steps=4, eval_every=1, save_every=1, **LM))
    return inputs / "finished"


@pytest.fixture
def output(finished, tmp_path) -> Path:
    """A copy of it, elsewhere."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def again(inputs, output, **changes) -> TrainConfig:
    return make_config(inputs, str(output), **{"steps": 4, "eval_every": 1, "save_every": 1, **LM, **changes})


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- from where ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "", "step-00000007\n"], ids=["lost", "empty", "wrong"])
def test_a_run_without_its_pointer_goes_on_and_deletes_nothing(inputs, output, text, capsys):
    pointer = output / "checkpoints" / "last"
    pointer.unlink() if text is None else pointer.write_text(text)
    before = listing(output)
    run = start(again(inputs, output))
    assert run.state.step == 4 and "step-00000004 is taken" in capsys.readouterr().err
    assert set(listing(output)) | {"checkpoints/last"} >= set(before)


def test_a_truncated_checkpoint_is_named_and_the_one_before_gives_the_same_steps(inputs, output, finished, capsys):
    path = output / "checkpoints" / "step-00000004" / "torch_engine.pt"
    path.write_bytes(path.read_bytes()[:1000])
    run = start(again(inputs, output))
    said = capsys.readouterr().err
    assert run.state.step == 2 and f"{path} has 1000 bytes and not" in said and "step-00000002 is taken" in said
    train(run)
    expected = losses(records(make_config(inputs, "finished")))
    assert losses(records(run.config)) == expected and [step for step, *_ in expected] == [1, 2, 3, 4]


def test_no_run_begins_beside_damaged_checkpoints(inputs, output, tmp_path, capsys):
    for path in output.glob("checkpoints/step-*/torch_engine.pt"):
        path.write_bytes(b"")
    before = listing(output)
    with pytest.raises(SystemExit) as ended:
        main(command(again(inputs, output)))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert ended.value.code == 2 and len(said) == 1
    assert "step-00000004/torch_engine.pt has 0 bytes and not" in said[0] and "name another output" in said[0]
    assert listing(output) == before


def test_resume_false_finds_checkpoints_without_a_pointer(inputs, output):
    (output / "checkpoints" / "last").unlink()
    with pytest.raises(ValueError, match="holds checkpoints: set resume to true"):
        start(again(inputs, output, resume=False))


# ---- with what -------------------------------------------------------------------------------------------------------


def saved(folder: Path, config: TrainConfig, best: float | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, Collectives(ParallelMesh.local().axis("world")))
    state = RunState(2, best=best, facts=make_facts(config, 1))
    checkpoints.save(state, lambda scratch: None, is_best=False)
    return checkpoints


def changed(config: TrainConfig, name: str, value) -> TrainConfig:
    return TrainConfig.from_dict(apply_overrides(config.to_dict(), [(name, value)]))


REFUSED = [
    ("optimizer.lr", 1e-2), ("optimizer.min_lr_ratio", 0.5), ("optimizer.warmup_steps", 3), ("optimizer.eps", 1e-6),
    ("optimizer.betas", [0.9, 0.99]), ("optimizer.weight_decay", 0.1), ("optimizer.max_grad_norm", None),
    ("steps", 9), ("keep_ratio", [0.2, 0.5]), ("d2o.budget.min_layer_tokens", 9), ("d2o.recent_fraction", 0.3),
    ("distill.kl_weight", 2.0), ("objective", "d2o_lm"), ("global_batch_size", 8), ("sequence_length", 128),
    ("context_length", 48), ("seed", 1), ("data.train", "elsewhere.jsonl"), ("data.text_field", "words"),
    ("dtype", "bfloat16"), ("model", "elsewhere"), ("revision", "main"), ("lora.rank", 8),
    ("engine", {"name": "deepspeed"}),
]  # fmt: skip
ALLOWED = [
    ("save_every", 3), ("log_every", 2), ("eval_every", 2), ("micro_batch_size", 2), ("sp", 2), ("loss_tile", 10),
    ("activation_checkpointing", True), ("device", "auto"), ("data.num_workers", 2), ("trust_remote_code", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_changes_the_mathematics_is_refused_by_name_with_both_values(inputs, tmp_path, name, value):
    config = make_config(inputs, distill=None) if name == "objective" else make_config(inputs)
    config = changed(config, "lora.rank", 4) if name == "lora.rank" else config
    other = changed(config, name, value)
    ((leaf, was, now),) = differences(config.to_dict(), other.to_dict())
    with pytest.raises(ValueError) as refused:
        go_on(saved(tmp_path, config), other, 1)
    found = str(refused.value)
    assert found.startswith(f"{leaf} (") and "must be that of the run in" in found
    for one in (was, now):
        assert ("null" if one is None else str(one)) in found


def test_another_learning_rate_is_bad_usage_and_changes_nothing(inputs, output, capsys):
    before = listing(output)
    with pytest.raises(SystemExit) as ended:
        main(command(again(inputs, output), "optimizer.lr=0.01"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert ended.value.code == 2 and len(said) == 1
    assert "optimizer.lr (0.01) must be that of the run in " in said[0] and "(0.003)" in said[0]
    assert listing(output) == before


def test_all_that_differs_is_named(inputs, tmp_path):
    config = make_config(inputs)
    other = changed(changed(config, "seed", 3), "optimizer.lr", 0.5)
    with pytest.raises(ValueError, match=r"optimizer.lr \(0.5\) .* \(0.003\), seed \(3\) too \(0\): put it back, or"):
        go_on(saved(tmp_path, config), other, 1)


@pytest.mark.parametrize(("name", "value"), ALLOWED, ids=[name for name, _ in ALLOWED])
def test_what_may_differ_is_said(inputs, tmp_path, name, value):
    config = make_config(inputs, eval_every=1)
    folder, state, notes = go_on(saved(tmp_path, config, best=1.0), changed(config, name, value), 1)
    ((_, was, _),) = differences(config.to_dict(), changed(config, name, value).to_dict())
    assert state.step == 2 and state.facts["config"] == make_facts(changed(config, name, value), 1)["config"]
    assert notes == [f"goes on from {folder.name} with {name} {value} (was {'null' if was is None else was})"]


def test_ranks_may_differ_and_what_is_not_read_is_not_said(inputs, tmp_path):
    config = make_config(inputs)
    checkpoints = saved(tmp_path, config)
    assert go_on(checkpoints, config, 2)[2] == ["goes on from step-00000002 with ranks 2 (was 1)"]
    for name, value in (("output", "elsewhere"), ("d2o.keep_ratio", 0.5)):
        assert go_on(checkpoints, changed(config, name, value), 1)[2] == []


def test_what_the_best_is_chosen_by_may_differ_before_something_was_measured(inputs, tmp_path):
    config = make_config(inputs)
    other = changed(config, "eval_ratios", [0.5])
    assert go_on(saved(tmp_path / "a", config), other, 1)[2]
    with pytest.raises(ValueError, match=r"eval_ratios \(\[0.5\]\) must be that of .* \(\[0.3\]\)"):
        go_on(saved(tmp_path / "b", config, best=1.0), other, 1)


def test_the_names_of_what_may_differ_are_fields(inputs):
    config = make_config(inputs).to_dict()
    for name in (MAY_DIFFER | MEASURED_BY | UNREAD) - {"ranks"}:
        part = config
        for key in name.split("."):
            part = part[key]


def test_paths_are_the_same_from_another_folder(inputs, tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, make_config(inputs))
    monkeypatch.chdir(inputs)
    data = {"train": "train.jsonl", "validation": "./validation.jsonl", "max_validation_rows": 3}
    assert go_on(checkpoints, make_config(inputs, model="model", data=data), 1)[2] == []


def test_a_run_is_extended_where_its_learning_rate_does_not_fall(inputs, tmp_path):
    constant = {"optimizer": {"lr": 3e-3, "warmup_steps": 2, "min_lr_ratio": 1.0}, **LM}
    expected = losses(run_whole(make_config(inputs, str(tmp_path / "whole"), steps=4, **constant)))
    run_whole(make_config(inputs, str(tmp_path / "out"), steps=2, **constant))
    assert losses(run_whole(make_config(inputs, str(tmp_path / "out"), steps=4, **constant))) == expected
    with pytest.raises(ValueError, match=r"steps \(3\) must be at least the steps that .*step-00000004 has done \(4\)"):
        start(make_config(inputs, str(tmp_path / "out"), steps=3, **constant))


@pytest.mark.parametrize("name", ["train", "validation"])
def test_documents_that_were_exchanged_are_refused(inputs, output, tmp_path, name):
    other = Path(shutil.copytree(inputs, tmp_path / "inputs", ignore=shutil.ignore_patterns("finished")))
    for checkpoint in output.glob("checkpoints/step-*"):  # as if the run had been made there
        state = json.loads((checkpoint / "state.json").read_text())
        state["facts"]["config"] = make_facts(again(other, output), 1)["config"]
        shutil.rmtree(checkpoint)
        saver = Checkpoints(output / "checkpoints", Collectives(ParallelMesh.local().axis("world")))
        saver.save(RunState(**state), lambda scratch: None, is_best=False)
    path = other / f"{name}.jsonl"
    path.write_text(json.dumps({"text": "others " * 400}) + "\n" + path.read_text())
    with pytest.raises(ValueError, match=rf"data.{name} holds other documents \(checksum \w+\) than those of the run"):
        start(again(other, output))


# ---- what is written of it -------------------------------------------------------------------------------------------


def test_a_line_that_was_written_in_part_is_dropped(inputs, output):
    log = output / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"kind": "train", "step": 5, "lo')
    start(again(inputs, output))
    assert log.read_text() == whole
    assert (output / "log-dropped.jsonl").read_text() == '{"kind": "train", "step": 5, "lo\n'


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_its_log_again(inputs, tmp_path):
    config = make_config(inputs, str(tmp_path / "out"), steps=2, **LM)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text('{"kind": "train", "step": 1, "loss": 0.5}\n')
    assert [step for step, *_ in losses(run_whole(config))] == [1, 2]
