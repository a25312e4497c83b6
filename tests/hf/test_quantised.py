"""Checkpoints with quantised weights, each where its package is installed: as `sdpa`, and compressed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.config.infer import InferConfig
from d2o_dist.models.loading import describe, load_model
from tests.engine.tiny import make_folder
from tests.models import tokens
from tests.spec import spec

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
GROUP = {"targets": ["Linear"], "weights": {**INT8, "strategy": "channel"},
         "input_activations": {**INT8, "strategy": "token", "dynamic": True}}  # fmt: skip
COMPRESSED = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
              "config_groups": {"group_0": GROUP}, "ignore": ["lm_head"]}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
       "modules_to_not_convert": ["lm_head"]}  # fmt: skip


def to_int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {name: (weight / scale).round().to(torch.int8), name + "_scale": scale}


def to_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax() / 448
    blocks = [-(-size // 128) for size in weight.shape]
    return {name: (weight / scale).to(torch.float8_e4m3fn), name + "_scale_inv": scale.expand(blocks).clone()}


def rewritten(folder: Path, method: dict[str, Any], quantise) -> None:
    """The checkpoint with the weights of its layers quantised, as a file says it."""
    found = load_file(folder / "model.safetensors")
    made = [quantise(name, weight.float()) if "_proj" in name else {name: weight.float()}
            for name, weight in found.items()]  # fmt: skip
    save_file({name: one for part in made for name, one in part.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32", "quantization_config": method}))


def saved_by_transformers(folder: Path, config: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)


def torchao(folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    saved_by_transformers(folder, TorchAoConfig(Int8WeightOnlyConfig()))


MAKE = {
    "torchao": torchao,
    "bitsandbytes": lambda folder: saved_by_transformers(folder, BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes 4": lambda folder: saved_by_transformers(
        folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    ),
    "bitsandbytes 4 nested": lambda folder: saved_by_transformers(
        folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    ),
    "compressed_tensors": lambda folder: rewritten(folder, COMPRESSED, to_int8),
    "fp8": lambda folder: rewritten(folder, FP8, to_fp8),
}


@pytest.mark.parametrize("kind", MAKE)
def test_it_loads_and_runs(kind, tmp_path):
    package = kind.split()[0]
    if package != "fp8" and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    folder = make_folder(tmp_path / "model", num_hidden_layers=1, hidden_size=128, intermediate_size=128)
    MAKE[kind](folder)
    config = InferConfig(model=str(folder), device="cpu")
    assert describe(config).num_heads == 4
    (model, other), ids = (load_model(config).model for _ in range(2)), tokens(2, 40)
    cache = D2OCache(config=model.config, d2o=spec(keep_ratio=0.4, min_layer_tokens=1))
    whole = D2OCache(config=model.config, d2o=D2OConfig.preset("full"))
    with torch.no_grad():
        found = model(ids, past_key_values=whole).logits
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=20)
        if kind == "compressed_tensors":
            other(ids, use_cache=False)  # the first forward makes ordinary weights of them
        cache.save(tmp_path / "cache")
        assert D2OCache.load(tmp_path / "cache", other).get_seq_length() == cache.get_seq_length()
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert cache.report().achieved_keep_ratio < 0.8


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes", "compressed-tensors"])
def test_a_missing_package_is_named_before_weights_are_read(method, tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    monkeypatch.setattr("d2o_dist.models.hf.quantised.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"are quantised by {method}: pip install {method} to load them"):
        describe(InferConfig(model=str(folder), device="cpu"))
