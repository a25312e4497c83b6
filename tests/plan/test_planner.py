"""Shapes, GPUs, legal meshes, what is ranked first, and what one rank can hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, Gemma3Config

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.plan.gpus import find_gpu
from d2o_dist.plan.memory import prompt_memory, reading_of
from d2o_dist.plan.meshes import all_meshes, share_of
from d2o_dist.plan.model_size import known_config, known_models, size_of
from d2o_dist.plan.planner import Workload, memory_of, plan_all
from d2o_dist.plan.seconds import Assumptions
from d2o_dist.policy import D2OConfig
from tests.families import build, tiny_config
from tests.models import tiny_model, tokens
from tests.tiny_types import CHANGES, class_of

LLAMA = size_of(known_config("llama-3-8b"))
H100 = find_gpu("h100-80gb")
LEAN = D2OConfig.preset("lean", keep_ratio=0.2)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3-8b", 8030261248), ("llama-3-70b", 70553706496), ("qwen2.5-7b", 7615616512), ("qwen3-8b", 8190735360),
     ("mixtral-8x7b", 46702792704), ("qwen3-30b-a3b", 30532122624)],
)
def test_known_models_have_their_parameters(name, parameters):
    assert size_of(known_config(name)).num_parameters == parameters


def test_every_known_model_says_what_to_load():
    assert all("/" in fields["hub"] for fields in known_models().values())


def test_the_shape_of_a_configuration_is_that_of_its_model():
    model = tiny_model("gemma3")
    shape = size_of(model.config)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.windows == (24, None, 24, None) and shape.num_full_layers == 2


EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 48, "moe_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0], "moe_intermediate_size": 32, "head_dim": 16},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_stored_and_some_are_read(family):
    """Beside a real model: all its parameters, and those that one token goes through."""
    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, num_experts_per_tok=1, **EXPERTS[family],
    )  # fmt: skip
    shape = size_of(config)
    parameters = {name: value.numel() for name, value in AutoModelForCausalLM.from_config(config).named_parameters()}
    experts = sum(size for name, size in parameters.items() if ".experts." in name)
    assert shape.num_parameters == sum(parameters.values()) and shape.experts == experts > 0
    active = shape.num_parameters - shape.experts + round(shape.experts_of(1))
    assert active == sum(parameters.values()) - experts * 3 // 4
    assert [shape.experts_of(tokens) / experts for tokens in (1, 2, 1000)] == pytest.approx([0.25, 1 - 0.75**2, 1])
    width = {"mixtral": 96, "qwen2_moe": 32, "qwen3_moe": 32}[family]
    assert (shape.expert_mlp, shape.mlp) == (width, {"mixtral": 0, "qwen2_moe": 48, "qwen3_moe": 96}[family])


@pytest.mark.parametrize("model_type", ["qwen3_next", "falcon_h1"])
@torch.no_grad()
def test_states_of_layers_are_counted_and_such_a_model_is_read_whole(model_type):
    """Beside a real model: linear attention and experts; Mamba and attention in each layer."""
    model = build(class_of(model_type), tiny_config(CONFIG_MAPPING[model_type], CHANGES.get(model_type)), "d2o").float()
    shape, ids = size_of(model.config), tokens(2, 40)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    session = Session(model, LEAN.replace(budget={"min_layer_tokens": 8}))
    session.prefill(ids, torch.ones_like(ids))
    assert 2 * 4 * (shape.states + shape.exact_states) == session.cache.report().state_bytes > 0
    memory, less = (prompt_memory(one, LEAN, share_of(shape, LEAN, ParallelConfig()), 40, 2, dtype=torch.float32)
                    for one in (shape, dataclasses.replace(shape, states=0, exact_states=0)))  # fmt: skip
    assert {one - other for one, other in ((memory.prompt, less.prompt), (memory.kept, less.kept))} == {
        session.cache.report().state_bytes
    }
    assert reading_of("auto", shape, LEAN) == "whole" and reading_of("auto", LLAMA, LEAN) == "layerwise"
    with pytest.raises(ValueError, match="needs a model that takes tiles, but some of its layers keep a state"):
        reading_of("layerwise", shape, LEAN)
    with pytest.raises(ValueError, match=r"sp \(2\) cannot share a text to this model"):
        share_of(shape, LEAN, ParallelConfig(sp=2))


def test_parts_that_read_images_are_on_every_rank():
    config = Gemma3Config(
        text_config=tiny_model("gemma3").config.to_dict(),
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    )
    whole, text = size_of(config), size_of(config.text_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert whole.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (whole.matrices, whole.kv_matrices) == (text.matrices, text.kv_matrices) and whole.others > 2 * text.others


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"quantised weights \(quant_method fp8\) are not"),
        ("gemma4_text", {}, "layers that differ in head_dim are not planned"),
        ("mimo_v2_flash", {}, "heads that differ are not planned"),
        ("ctrl", {}, "does not say intermediate_size"),
        ("aria_text", {}, "must say num_experts and num_experts_per_tok"),
        ("llava", {}, "transformers makes no such model: Unrecognized configuration class"),
        ("qwen3", {"num_attention_heads": 0}, "transformers makes no such model: integer"),
    ],
)
def test_models_that_are_not_planned_say_why(model_type, fields, reason):
    config = tiny_config(CONFIG_MAPPING[model_type])
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=reason):
        size_of(config)


def test_widths_of_models_with_other_names():
    assert [size_of(tiny_config(CONFIG_MAPPING[one])).mlp for one in ("gpt2", "opt", "bert")] == [128, 48, 48]


def test_a_rank_holds_all_experts_or_its_part_and_a_token_reads_some(work):
    """3 matrices of 4096 x 14336 in each of 8 experts and 32 layers; two of the eight are read for one row."""
    mixtral = size_of(known_config("mixtral-8x7b"))
    assert mixtral.experts == 32 * 8 * 3 * 4096 * 14336
    weights = {}
    for engine in ("deepspeed", "transformers"):
        share = share_of(mixtral, LEAN, ParallelConfig(tp=4, tp_engine=engine))
        weights[engine] = prompt_memory(mixtral, LEAN, share, 4096).weights
    assert weights["deepspeed"] > 2 * mixtral.experts > 3 * weights["transformers"]
    (one,), _ = plan_all(dataclasses.replace(work, model=mixtral, num_gpus=1), ParallelConfig(), "latency")
    (eight,), _ = plan_all(dataclasses.replace(work, model=mixtral, num_gpus=1, batch=8), ParallelConfig(), "latency")
    bandwidth = H100.bandwidth_gb_s * 1e9 * 0.6
    read = [plan.times.token_memory * bandwidth - plan.memory.kept for plan in (one, eight)]
    held = 2 * (mixtral.num_parameters - mixtral.experts - 32000 * 4096)
    assert read[0] == pytest.approx(held + 2 * mixtral.experts / 4, rel=1e-6)
    assert read[1] == pytest.approx(held + 2 * mixtral.experts * (1 - 0.75**8), rel=1e-6)


def test_a_file_adds_gpus_and_goes_before_the_table(tmp_path):
    file = tmp_path / "gpus.yaml"
    figures = "{memory_gib: 96, bandwidth_gb_s: 1, tflops: 1, intra_gb_s: 1, inter_gb_s: 1}"
    file.write_text(f"mine: {figures}\nh100-80gb: {figures}\n")
    assert find_gpu("mine", file).memory_gib == find_gpu("h100-80gb", file).memory_gib == 96
    assert find_gpu("l40s", file) == find_gpu("l40s")
    file.write_text("mine: {memory_gib: 96, bandwidth_gb_s: 1, tflops: 0, intra_gb_s: 1, inter_gb_s: 1}\n")
    with pytest.raises(ValueError, match=r"gpu\.tflops \(0\) must be above 0"):
        find_gpu("mine", file)
    with pytest.raises(ValueError, match='Did you mean "h100-80gb"'):
        find_gpu("h100-80")


def test_all_meshes_of_twelve_gpus():
    sizes = {(mesh.dp, mesh.sp, mesh.tp) for mesh in all_meshes(ParallelConfig(), 12)}
    assert len(sizes) == 18 and all(dp * sp * tp == 12 for dp, sp, tp in sizes)
    assert {(mesh.sp, mesh.tp) for mesh in all_meshes(ParallelConfig(tp=2), 12)} == {(1, 2), (2, 2), (3, 2), (6, 2)}


@pytest.mark.parametrize(
    ("family", "d2o", "parallel", "reason"),
    [
        ("llama", {}, ParallelConfig(tp=3), r"num_attention_heads \(4\) must be divisible by tp \(3\)"),
        ("phi3", {}, ParallelConfig(tp=2), "tp needs a model whose q_proj, k_proj, v_proj are separate"),
        ("llama", {}, ParallelConfig(sp=4, sp_prefill="ulysses"), "a tensor rank has 2 and sp is 4"),
        ("llama", {"preset": "reread"}, ParallelConfig(sp=4), "need all slots of a KV head on one rank"),
    ],
)
def test_what_a_run_would_refuse_is_illegal(family, d2o, parallel, reason):
    shape = size_of(tiny_model(family).config)
    with pytest.raises(ValueError, match=reason):
        share_of(shape, D2OConfig.from_dict(d2o), parallel)


def test_more_tensor_ranks_than_kv_heads_copy_them():
    share = share_of(LLAMA, LEAN, ParallelConfig(tp=16))
    assert (share.kv_heads, share.copies, share.query_heads) == (1, 2, 2)


@pytest.mark.parametrize("reading", ["whole", "layerwise"])
def test_memory_of_a_known_model(reading):
    """Llama-3-8B, 131072 tokens in bfloat16: 128 KiB of keys and values a token, and 20 bytes a slot beside them."""
    share = share_of(LLAMA, LEAN, ParallelConfig())
    memory = prompt_memory(LLAMA, LEAN, share, 131072, chunk=16384, reading=reading)
    assert memory.prompt == 131072 * 32 * 8 * (2 * 128 * 2 + 20) == 32 * memory.one_layer
    assert memory.weights == 2 * 8030261248
    # A fifth, and 16 slots to grow in each layer.
    assert memory.kept == 8 * 532 * (32 * 131072 // 5 + 32 * 16)
    held = memory.reading_peak - memory.forward
    if reading == "whole":
        assert held == memory.prompt + memory.statistics
    else:
        assert held == memory.kept + memory.one_layer + memory.statistics // 32 + memory.hidden


@pytest.fixture(scope="module")
def work():
    return Workload(LLAMA, LEAN, H100, tokens=131072, num_gpus=8, chunk=16384)


def test_the_fastest_that_fits_is_first(work):
    plans, refused = plan_all(work, ParallelConfig(), "latency")
    assert len(plans) == 10 and not refused
    assert [plan.batch_s for plan in plans] == sorted(plan.batch_s for plan in plans)
    assert plans[0].dp == 1  # all GPUs for one request
    most, _ = plan_all(work, ParallelConfig(), "throughput")
    assert most[0].requests_per_s == max(plan.requests_per_s for plan in plans)


def test_what_does_not_fit_is_last_and_the_largest_batch_fits(work):
    tight = dataclasses.replace(work, gpu=dataclasses.replace(H100, memory_gib=30), batch=6)
    plans, _ = plan_all(tight, ParallelConfig(), "throughput")
    assert [plan.fits for plan in plans] == sorted((plan.fits for plan in plans), reverse=True)
    assert {plan.fits for plan in plans} == {True, False}
    for plan in plans:
        assert plan.fits == (plan.memory.peak <= tight.room)
        assert memory_of(tight, plan.share, plan.most_rows + 1).peak > tight.room
        assert not plan.most_rows or memory_of(tight, plan.share, plan.most_rows).peak <= tight.room


def test_compression_makes_room_while_generating_and_tokens_faster(work):
    full = dataclasses.replace(work, d2o=D2OConfig.preset("full"), num_gpus=1)
    kept, whole = (plan_all(one, ParallelConfig(), "latency")[0][0] for one in (
        dataclasses.replace(full, d2o=LEAN), full
    ))  # fmt: skip
    assert kept.memory.decoding < whole.memory.decoding and kept.times.token < whole.times.token
    assert kept.memory.prompt == whole.memory.prompt


def test_links_between_nodes_are_slower(work):
    apart = dataclasses.replace(work, gpus_per_node=4)
    near, far = (plan_all(one, ParallelConfig(tp=8), "latency")[0][0].times for one in (work, apart))
    assert near.prompt_links < far.prompt_links and near.token_links < far.token_links


def test_refusals(work):
    with pytest.raises(ValueError, match="aim"):
        plan_all(work, ParallelConfig(), "speed")
    with pytest.raises(ValueError, match=r"num_gpus \(12\) must be a multiple of gpus_per_node \(8\)"):
        dataclasses.replace(work, num_gpus=12)
    with pytest.raises(ValueError, match=r"tokens \(0\)"):
        dataclasses.replace(work, tokens=0)
    with pytest.raises(ValueError, match=r"assume\.matmul \(2\)"):
        Assumptions(matmul=2)

