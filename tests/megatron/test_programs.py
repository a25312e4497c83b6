"""Programs on Megatron checkpoints: converted, described, read on meshes they were not saved on, refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from transformers import AutoModelForCausalLM

from d2o_dist.cli import convert, infer, plan
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.megatron import ARGUMENTS, MegatronArguments
from d2o_dist.engine.session import Session
from d2o_dist.fields.io import dump_yaml, load_yaml
from d2o_dist.models.digest import model_digests
from d2o_dist.models.loading import describe, load_model
from tests.cli.speak import speak
from tests.engine.tiny import make_folder
from tests.models import left_padded
from tests.ranks import run_ranks
from tests.spec import spec

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.multirank
TIMEOUT_S = 300  # importing megatron-core takes its time
SMALL = ["d2o.budget.min_layer_tokens=8", "sampling.max_new_tokens=12", "device=cpu", "d2o.keep_ratio=0.4"]


def run_program(rank, world, main, argv):
    """What a program says, as a rank."""
    from megatron.core import parallel_state

    try:
        return speak({"infer": infer.main, "convert": convert.main}[main], argv)
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face model and what the converter makes of it."""
    source = make_folder(tmp_path_factory.mktemp("model"), vocab_size=401, max_position_embeddings=512)
    made = source.parent / f"{source.name}-megatron"
    ((status, said, wrong),) = run_ranks(
        1, run_program, "convert", [str(source), str(made), "--to", "megatron"], timeout_s=TIMEOUT_S
    )
    assert (status, wrong) == (0, "") and f"model={made} tokenizer={source} model_kind=megatron" in said
    return source, made


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    text = "the lazy dog jumps over one two three four five quick brown foxes " * 3
    path.write_text("".join(json.dumps({"prompt": text[place:]}) + "\n" for place in (0, 40, 111)))
    return str(path)


def records(said: str) -> list[dict]:
    return sorted((json.loads(line) for line in said.splitlines()), key=lambda record: record["index"])


@pytest.fixture(scope="module")
def wanted(folders, prompts):
    """What the Hugging Face folder answers."""
    status, said, _ = speak(infer.main, ["--model", str(folders[0]), "--prompts", prompts, *SMALL])
    assert status == 0
    return records(said)


@pytest.mark.parametrize(("dp", "sp", "tp"), [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_the_text_is_that_of_the_hugging_face_folder(folders, prompts, wanted, tmp_path, dp, sp, tp):
    """The checkpoint was written by one process; its vocabulary is odd. On ranks by what the planner writes."""
    source, made = folders
    argv = ["--model", str(made), "model_kind=megatron", f"tokenizer={source}", *SMALL]
    world, output = dp * sp * tp, tmp_path / "answers.jsonl"
    if world > 1:
        mesh, file = [f"parallel.dp={dp}", f"parallel.sp={sp}", f"parallel.tp={tp}"], str(tmp_path / "run.yaml")
        ask = ["--context", "300", "--gpu", "h100-80gb", "--gpus", str(world), "--write", file]
        assert speak(plan.main, [*argv, *mesh, *ask])[0] == 0
        argv = ["--config", file]
    argv += ["--prompts", prompts, "--output", str(output)]
    said = run_ranks(world, run_program, "infer", argv, timeout_s=TIMEOUT_S)
    assert [status for status, _, _ in said] == [0] * world, said
    found = records(output.read_text())
    assert [record["text"] for record in found] == [record["text"] for record in wanted]
    assert all(0 < record["achieved_keep_ratio"] < 0.9 for record in found)


def test_rows_that_come_and_go_are_sampled_as_of_the_hugging_face_folder(folders, prompts):
    source, made = folders
    argv = ["--prompts", prompts, *SMALL, "max_batch_size=2", "sampling.temperature=0.9", "sampling.seed=5"]
    wanted = records(speak(infer.main, ["--model", str(source), *argv])[1])
    mine = ["--model", str(made), "model_kind=megatron", f"tokenizer={source}", *argv]
    ((status, said, _),) = run_ranks(1, run_program, "infer", mine, timeout_s=TIMEOUT_S)
    found = records(said)
    assert status == 0 and len({record["text"] for record in found}) == 3
    for one, other in zip(found, wanted, strict=True):
        for name in ("text", "num_new_tokens", "achieved_keep_ratio", "held_bytes"):
            assert one[name] == other[name]


def test_a_checkpoint_comes_back_as_a_hugging_face_folder(folders, tmp_path):
    source, made = folders
    back = str(tmp_path / "back")
    argv = [str(made), back, "--to", "transformers"]
    ((status, _, wrong),) = run_ranks(1, run_program, "convert", argv, timeout_s=TIMEOUT_S)
    assert (status, wrong) == (0, "")
    one, other = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (source, back))
    assert one.generation_config.eos_token_id == [other.config.eos_token_id] == [1]
    weights = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(weights.pop(name), value), name
    assert weights == {}


def test_weights_that_are_cut_off_are_one_line(folders, tmp_path):
    made = Path(shutil.copytree(folders[1], tmp_path / "made"))
    part = next(made.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:1000])
    argv = [str(made), str(tmp_path / "back"), "--to", "transformers"]
    ((status, _, wrong),) = run_ranks(1, run_program, "convert", argv, timeout_s=TIMEOUT_S)
    assert status == 2 and wrong.count("\n") == 1 and len(wrong) < 600
    assert wrong.startswith(f"d2o-dist convert: error: the weights of {made} cannot be read: ")


def test_the_planner_reads_a_checkpoint_and_writes_what_runs_it(folders, tmp_path):
    source, made = map(str, folders)
    argv = ["--context", "300", "--gpu", "h100-80gb", "--gpus", "2", "sampling.max_new_tokens=8"]
    one = speak(plan.main, ["--model", source, *argv, "parallel.tp_engine=transformers", "--markdown"])
    mine = ["--model", made, "model_kind=megatron", f"tokenizer={source}", *argv]
    assert one == speak(plan.main, [*mine, "--markdown"]) and one[0] == 0
    assert speak(plan.main, [*mine, "--write", str(tmp_path / "run.yaml")])[0] == 0
    config = InferConfig.load(tmp_path / "run.yaml")
    assert (config.model, config.model_kind, config.tokenizer) == (made, "megatron", source)
    assert "set model_kind=megatron" in speak(plan.main, ["--model", made, *argv])[2]
    odd = copied(Path(made), tmp_path)
    (odd / ARGUMENTS).write_text(dump_yaml({**load_yaml(odd / ARGUMENTS), "ffn_hidden_size": 95}))
    status, said, _ = speak(plan.main, ["--model", str(odd), *mine[2:]])
    assert status == 0 and "illegal:\n1 x 1 x 2: ffn_hidden_size (95) must be divisible by tp (2)\n" in said


EXPERTS = MegatronArguments(
    num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96, vocab_size=89,
    max_sequence_length=256, normalization="RMSNorm", qk_layernorm=True, activation_func="silu",
    gated_linear_unit=True, add_bias_linear=False, position_embedding_type="rope", rotary_interleaved=True,
    window_size=(9, 0), window_attn_skip_freq=2, num_moe_experts=4, moe_ffn_hidden_size=32, moe_router_topk=2,
    moe_layer_freq=(0, 1), moe_shared_expert_intermediate_size=32,
)  # fmt: skip


def experts(rank, world, folder):
    """A model with experts, windows and interleaved rotation in one file; and what is said of files that do not fit."""
    from d2o_dist.models.megatron import MegatronModel
    from d2o_dist.models.megatron.build import build_gpt
    from d2o_dist.models.megatron.checkpoint import write_weights
    from d2o_dist.models.megatron.ranks import alone

    config, said = InferConfig(model=str(folder), model_kind="megatron", tokenizer="-", device="cpu"), []

    def refusal() -> str:
        with pytest.raises(ValueError) as caught:
            load_model(config)
        return str(caught.value)

    with alone(), torch.no_grad():
        torch.manual_seed(0)
        model = build_gpt(EXPERTS, params_dtype=torch.float64, init_method_std=0.2)
        folder.mkdir()
        write_weights(model, folder)
        (folder / ARGUMENTS).write_text(dump_yaml(EXPERTS.to_dict()))
        ids, mask = left_padded([40, 31])
        # Megatron's own writer leaves the plans of its ranks too.
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        index = next(iter(metadata.storage_data))
        metadata.all_local_plans = [SavePlan([WriteItem(index, WriteItemType.SHARD)])]
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        both = MegatronModel(model.eval(), 89), load_model(config)
        # Weights that lie elsewhere in memory may round otherwise.
        logits = (Session(one, spec("lean")).prefill(ids, mask) for one in both)
        torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)
        for change in ({"qk_layernorm": False}, {"vocab_size": 90}, {"num_layers": 3, "moe_layer_freq": [0, 1, 1]}):
            (folder / ARGUMENTS).write_text(dump_yaml({**EXPERTS.to_dict(), **change}))
            said.append(refusal())
        (folder / ARGUMENTS).write_text(dump_yaml(EXPERTS.to_dict()))
        (folder / ".metadata").write_bytes(pickle.dumps(print))
        said.append(refusal())
    return said


def test_experts_are_loaded_and_what_does_not_fit_is_refused(tmp_path):
    (said,) = run_ranks(1, experts, tmp_path / "experts", timeout_s=TIMEOUT_S)
    for found, message in zip(said, (
        "do not fit its arguments: of their keys 4 are unexpected (decoder.layers.0.",
        "(embedding.word_embeddings.weight: [89, 64] in the file, [90, 64] in the model",
        "are missing (decoder.layers.2.",
        "it names builtins.print: if you trust who wrote it",
    ), strict=True):  # fmt: skip
        assert message in found


@pytest.mark.parametrize(
    ("change", "run", "message"),
    [
        ({"num_query_grops": 2}, {}, 'has no field "num_query_grops". Did you mean "num_query_groups"'),
        ({"num_query_groups": 3}, {}, "num_attention_heads (4) must be divisible by num_query_groups (3)"),
        ({"num_layers": None}, {}, "num_layers is missing"),
        ({"rotary_base": "big"}, {}, "rotary_base ('big') must be a finite number"),
        ({"pipeline_model_parallel_size": 4}, {}, "pipeline_model_parallel_size (4) must be 1"),
        ({"tensor_model_parallel_size": 2}, {}, "no part of the model: say parallel.tp"),
        ({"position_embedding_type": "mrope"}, {}, "position_embedding_type ('mrope') must be one of"),
        ({}, {"tp": 3}, "num_attention_heads (4) must be divisible by tp (3)"),
        ({"ffn_hidden_size": 95}, {"tp": 2}, "ffn_hidden_size (95) must be divisible by tp (2)"),
        ({"num_moe_experts": 4}, {"tp": 2}, "tp (2) must be 1 on a CPU with num_moe_experts (4)"),
    ],
)
def test_arguments_are_refused_before_weights_are_read(folders, tmp_path, change, run, message):
    values = {**load_yaml(folders[1] / ARGUMENTS), **change}
    folder = copied(folders[1], tmp_path)
    (folder / ARGUMENTS).write_text(dump_yaml({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(ValueError) as caught:
        describe(InferConfig.from_dict(
            {"model": str(folder), "model_kind": "megatron", "tokenizer": "-", "device": "cpu", "parallel": run}
        ))  # fmt: skip
    assert message in str(caught.value)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copied"))


def test_files_that_are_missing_are_named_and_all_are_in_the_digests(folders, tmp_path):
    folder = copied(folders[1], tmp_path)
    config = InferConfig(model=str(folder), model_kind="megatron", tokenizer="-", device="cpu")
    with pytest.raises(ValueError, match="set model_kind=megatron"):
        describe(InferConfig(model=str(folder)))
    with pytest.raises(ValueError, match="tokenizer is missing"):
        InferConfig(model=str(folder), model_kind="megatron")
    files = sorted(path.name for path in folder.iterdir())
    digests = model_digests(str(folder))
    assert sorted(digests) == files
    # As training leaves them: a folder for each iteration, and a file that names the newest.
    newest = folder / "iter_0000020"
    newest.mkdir()
    for name in files:
        if name != ARGUMENTS:
            (folder / name).rename(newest / name)
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    shape = describe(config)
    assert (shape.num_heads, shape.num_kv_heads, shape.vocab_size) == (4, 2, 401)
    weights = next(newest.glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    changed = model_digests(str(folder))
    assert changed[f"iter_0000020/{weights.name}"] != digests[weights.name]
    for name, message in (
        ("common.pt", "set trust_pickled_weights=true"), (weights.name, "has no *.distcp"),
        (".metadata", "has no .metadata"), ("metadata.json", "has no metadata.json"),
    ):  # fmt: skip
        (newest / name).unlink()
        with pytest.raises(ValueError, match=re.escape(message)):
            describe(config)
    (folder / ARGUMENTS).unlink()
    with pytest.raises(ValueError, match="has no megatron.yaml"):
        describe(config)
