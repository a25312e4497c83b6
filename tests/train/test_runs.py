"""Whole runs on one process: learning, stopping and going on, LoRA, bfloat16, export, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2o_dist import D2OCache
from d2o_dist.cli.train import main
from d2o_dist.comm import Collectives, ParallelMesh
from d2o_dist.fields.io import dump_yaml
from d2o_dist.train import loop
from d2o_dist.train.checkpoints import Checkpoints, RunState
from tests.models import tokens
from tests.spec import spec
from tests.train.runs import D2O_LM, LM, make_config, make_inputs, records, run_whole, start, steps_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def losses(found):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in found if row["kind"] == "train"]


def test_distillation_lowers_the_held_out_divergence_and_keeps_the_full_cache(inputs):
    config = make_config(inputs, "learns", steps=12, eval_every=6)
    found = [row for row in run_whole(config) if row["kind"] == "eval"]
    assert [row["step"] for row in found] == [0, 6, 12]
    assert found[-1]["kl@0.3"] < 0.8 * found[0]["kl@0.3"]
    assert found[-1]["full_lm"] < found[0]["full_lm"]


@pytest.mark.parametrize("objective", [{}, D2O_LM, LM], ids=["d2o_distill", "d2o_lm", "lm"])
def test_a_broken_run_goes_on_to_the_same_losses(inputs, objective, tmp_path, monkeypatch):
    whole = make_config(inputs, str(tmp_path / "whole"), save_every=2, **objective)
    expected = losses(run_whole(whole))
    broken = make_config(inputs, str(tmp_path / "broken"), save_every=2, **objective)
    take_step = loop.take_step

    def dies(run, step):
        if step == 3:
            raise KeyboardInterrupt
        return take_step(run, step)

    monkeypatch.setattr(loop, "take_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run_whole(broken)
    monkeypatch.setattr(loop, "take_step", take_step)
    # Steps 1 and 2 are in the checkpoint; step 3 was lost, is taken again, and stands in the log once.
    assert losses(run_whole(broken)) == expected
    dropped = (tmp_path / "broken" / "log-dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in dropped] == [3]


@pytest.mark.parametrize(("where", "name"), [(loop, "export_model"), (Checkpoints, "save")], ids=["export", "save"])
def test_the_best_model_is_exported_also_if_the_run_was_broken_there(inputs, tmp_path, monkeypatch, where, name):
    config = make_config(inputs, str(tmp_path / "out"), steps=2, eval_every=1)

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    def run(*measured: float) -> None:
        values = iter(measured)
        monkeypatch.setattr(loop, "headline", lambda *args: next(values))
        run_whole(config)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(where, name, dies)
        run(3.0, 1.0)  # before the first step, and after it
    run(3.0, 1.0, 2.0)
    best = torch.load(tmp_path / "out" / "checkpoints" / "step-00000001" / "torch_engine.pt")["weights"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model-best")
    for parameter, p in exported.named_parameters():
        assert torch.equal(p, best[f"model.{parameter}"])


def test_accumulated_gradients_equal_one_large_batch(inputs):
    expected = steps_of(make_config(inputs, micro_batch_size=4), 2)
    for size in (1, 2):
        assert steps_of(make_config(inputs, micro_batch_size=size), 2) == pytest.approx(expected, rel=1e-4)


def test_recomputed_activations_change_nothing(inputs):
    expected = steps_of(make_config(inputs), 2)
    assert steps_of(make_config(inputs, activation_checkpointing=True), 2) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_near_float32(inputs):
    expected = steps_of(make_config(inputs), 2)
    assert steps_of(make_config(inputs, dtype="bfloat16"), 2) == pytest.approx(expected, rel=0.05)


def test_the_exported_model_is_the_trained_one(inputs, tmp_path):
    config = make_config(inputs, str(tmp_path / "out"), steps=2)
    run = start(config)
    loop.train(run)
    ids = tokens(1, 40)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", attn_implementation="d2o")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", attn_implementation="sdpa")
    trained = {name: p for name, p in run.engine.objective.model.named_parameters()}
    for name, p in exported.named_parameters():
        assert torch.equal(p, trained[name])
    cache = D2OCache(config=exported.config, d2o=spec("full"))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids, past_key_values=cache).logits, plain(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model").eos_token == "</s>"
    assert exported.config.use_cache


def test_lora_trains_additions_and_exports_their_sum(inputs, tmp_path):
    pytest.importorskip("peft")
    config = make_config(inputs, str(tmp_path / "out"), steps=3, lora={"rank": 4}, distill={"teacher": "base"})
    run = start(config)
    loop.train(run)
    model = run.engine.objective.model.eval()
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", attn_implementation="sdpa")
    before = AutoModelForCausalLM.from_pretrained(inputs / "model", attn_implementation="sdpa", dtype=torch.float32)
    model.get_base_model().set_attn_implementation("sdpa")
    ids = tokens(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert (exported(ids).logits - before(ids).logits).abs().max() > 1e-2
    # Nothing but the additions is in the checkpoint, and a run goes on from it.
    (state,) = (tmp_path / "out" / "checkpoints").glob("step-*/torch_engine.pt")
    assert all("lora_" in name for name in torch.load(state)["weights"])
    again = start(config)
    assert again.state.step == 3
    torch.testing.assert_close(
        {n: p.detach() for n, p in again.engine.objective.model.named_parameters()},
        {n: p.detach() for n, p in model.named_parameters()}, rtol=0, atol=0,
    )  # fmt: skip


def test_last_and_best_are_kept_and_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path, Collectives(ParallelMesh.local().axis("world")))
    assert checkpoints.find() is None

    def write(folder):
        (folder / "weights").write_text(folder.name)

    for step, is_best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        checkpoints.save(RunState(step), write, is_best=is_best)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["step-00000003", "step-00000005"]
    assert checkpoints.find("best").name == "step-00000003" and Checkpoints.read(checkpoints.find()).step == 5

    def dies(folder):
        write(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(RunState(6), dies, is_best=True)
    assert Checkpoints.read(checkpoints.find()).step == 5 and checkpoints.find("best").name == "step-00000003"
    checkpoints.save(RunState(6), write, is_best=False)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(
    ("objective", "message"),
    [({}, "the attention of a prompt is not finite"), (LM, "step 1: a loss is not finite")],
    ids=["d2o_distill", "lm"],
)
def test_what_is_not_finite_ends_the_run(inputs, tmp_path, objective, message):
    run = start(make_config(inputs, str(tmp_path / "out"), **objective))
    with torch.no_grad():
        next(run.engine.objective.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=message):
        loop.train(run)


def test_a_model_of_few_layers_is_trained_with_equal_shares(inputs, tmp_path):
    config = make_config(inputs, str(tmp_path / "out"), d2o={"budget": {"min_layer_tokens": 8}})
    run = start(config)
    assert (config.d2o.budget.name, run.config.d2o.budget.name) == ("dispersion", "uniform")


def command(config, *more):
    """The command line of a configuration."""
    path = Path(config.output).parent / "config.yaml"
    path.write_text(dump_yaml(config.to_dict()))
    return ["--config", str(path), *more]


def test_the_command_trains_and_names_the_model(inputs, tmp_path, capsys):
    config = make_config(inputs, str(tmp_path / "out"), steps=2, **LM)
    assert main(command(config, "steps=1")) == 0
    assert "the model is in" in capsys.readouterr().err
    assert [row["step"] for row in records(config)] == [1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sequence_length=300", "context_length=200"], "must be at most the model's max_position_embeddings (256)"),
        (["model=./nowhere"], "model folder ./nowhere does not exist"),
        (["data.train=./nowhere.txt"], "./nowhere.txt cannot be read"),
        (["engine.name=deepspeed"], 'engine.name "deepspeed" needs a launcher'),
        (["sp=2"], "world size (1) must be a multiple of sp (2)"),
        (["lora.targets=[nope]"], "lora.targets (['nope']): Target modules {'nope'} not found"),
        (["d2o.budget.protected_layers=[7]"], "protected_layers has 7, but the model has 2 layers"),
        (["stepz=3"], 'no field "stepz". Did you mean "steps"?'),
    ],
)
def test_bad_usage_is_one_line_and_status_2(inputs, tmp_path, capsys, overrides, message):
    try:
        status = main(command(make_config(inputs, str(tmp_path / "out")), *overrides))
    except SystemExit as ended:  # once ranks may be waiting, the process is ended
        status = ended.code
    assert status == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert len(said) == 1 and message in said[0]


def test_a_finished_folder_is_not_trained_over_unasked(inputs, tmp_path):
    output = str(tmp_path / "out")
    run_whole(make_config(inputs, output, steps=1))
    with pytest.raises(ValueError, match="holds checkpoints: set resume to true"):
        start(make_config(inputs, output, steps=1, resume=False))
    with pytest.raises(ValueError, match=r"steps \(9\) must be that of the run in .* \(1\)"):
        start(make_config(inputs, output, steps=9))


def test_a_measure_or_a_gradient_that_is_no_number_ends_the_run(inputs, tmp_path, monkeypatch):
    """Before anything is written: a measure of NaN would be the best of all, and its weights exported."""
    config = make_config(inputs, str(tmp_path / "measure"), eval_every=1, **LM)
    monkeypatch.setattr(loop, "measure", lambda *args: {"lm": float("nan")})
    with pytest.raises(FloatingPointError, match=r"step 0: what is measured is not finite \(lm nan\)"):
        loop.train(start(config))
    assert not list((tmp_path / "measure").glob("model*")) and not (tmp_path / "measure" / "log.jsonl").exists()
    monkeypatch.undo()
    run = start(make_config(inputs, str(tmp_path / "gradient"), **LM))
    run.engine.parameters[0].register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match="step 1: the norm of the gradients is not finite"):
        loop.train(run)
    assert not list((tmp_path / "gradient").glob("*/*")) and not (tmp_path / "gradient" / "log.jsonl").exists()
