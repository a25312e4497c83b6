"""Weights that do not fit the model: refused by name, never made up."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2o_dist.config.infer import InferConfig
from d2o_dist.models.hf.checkpoint import check_keys, without_report
from d2o_dist.models.loading import load_model
from tests.engine.tiny import make_folder


@pytest.fixture
def heard():
    """What transformers logs while it loads."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def rewrite(folder, change=lambda weights: None, **fields) -> InferConfig:
    """Change the weights and the configuration of a folder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return InferConfig(model=str(folder), device="cpu")


DOES_NOT_FIT = [
    ({"num_hidden_layers": 3}, lambda weights: None,
     "9 are missing (model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
     "model.layers.2.mlp.gate_proj.weight and 6 more)"),
    ({"num_hidden_layers": 1}, lambda weights: None, "9 are unexpected (model.layers.1.input_layernorm.weight, "),
    ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, lambda weights: None,
     "6 are missing (model.layers.0.self_attn.k_proj.bias, "),
    ({"intermediate_size": 95}, lambda weights: None,
     "6 are of another shape (model.layers.0.mlp.down_proj.weight: [64, 96] in the file, [64, 95] in the model, "),
    ({}, lambda weights: weights.pop("model.norm.weight"), "of their keys 1 is missing (model.norm.weight)"),
    ({}, lambda weights: weights.pop("lm_head.weight"), "of their keys 1 is missing (lm_head.weight)"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "change", "message"), DOES_NOT_FIT, ids=[case[-1][:40] for case in DOES_NOT_FIT])
def test_keys_that_do_not_fit_are_named_and_counted(tmp_path, heard, fields, change, message):
    config = rewrite(make_folder(tmp_path / "m"), change, **fields)
    with pytest.raises(ValueError) as caught:
        load_model(config)
    assert str(caught.value).startswith(f"the weights of {config.model} do not fit its config.json: of their keys ")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not [line for line in heard if "LOAD REPORT" in line]


def test_what_may_be_absent_or_over(tmp_path):
    """Tied weights are stored once, and old checkpoints have rotary frequencies in every layer."""
    folder = make_folder(tmp_path / "m", tie_word_embeddings=True)

    def change(weights):
        assert "lm_head.weight" not in weights
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    model = load_model(rewrite(folder, change)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_table_is_held_back_unless_something_raises(heard):
    logger = logging.getLogger("transformers.modeling_utils")
    with without_report():
        logger.warning("M LOAD REPORT from: m")
        logger.warning("something else")
    assert heard == ["something else"]
    with pytest.raises(RuntimeError), without_report():
        logger.warning("M LOAD REPORT from: n")
        raise RuntimeError("look at the report")
    assert heard[1:] == ["M LOAD REPORT from: n"]


def test_all_kinds_in_one_line():
    found = {"missing_keys": {"a"}, "unexpected_keys": {"b", "c"}, "mismatched_keys": {("d", (1, 2), (3,))}}
    with pytest.raises(ValueError) as caught:
        check_keys("m", found)
    assert str(caught.value) == (
        "the weights of m do not fit its config.json: of their keys 1 is missing (a), 2 are unexpected (b, c), 1 is of "
        "another shape (d: [1, 2] in the file, [3] in the model)"
    )
    check_keys("m", dict.fromkeys(found, ()))
