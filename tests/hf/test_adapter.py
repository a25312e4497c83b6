"""A folder of an adapter as the model: merged into its base, or refused with what to do."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2o_dist.config.infer import InferConfig
from d2o_dist.models import adapter_files
from d2o_dist.models.digest import model_digests
from d2o_dist.models.hf.loading import load_config, load_tokenizer
from d2o_dist.models.loading import load_model
from tests.engine.tiny import make_folder


@pytest.fixture
def lora(tmp_path):
    """(folder of the base, folder of an adapter that changes it)."""
    base = make_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, options)
    tuned.save_pretrained(tmp_path / "lora")
    return base, tmp_path / "lora"


def test_an_adapter_is_merged_into_its_base(lora):
    base, folder = lora
    config = InferConfig(model=str(folder), device="cpu")
    merged, ids = load_model(config).model, torch.arange(2, 30)[None]
    with torch.no_grad():
        found = merged(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="d2o").eval()
        expected = peft.PeftModel.from_pretrained(plain, folder)(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (load_model(InferConfig(model=str(base), device="cpu")).model(ids).logits - found).abs().max() > 0.01
    assert type(merged).__name__ == "LlamaForCausalLM" and merged.config._attn_implementation == "d2o"
    assert load_config(config).model_type == "llama" and load_tokenizer(config) is not None
    assert set(model_digests(str(base)).values()) < set(model_digests(str(folder)).values())


def test_what_cannot_be_merged_is_refused_before_anything_is_loaded(lora, monkeypatch):
    base, folder = lora
    config, path = InferConfig(model=str(folder), device="cpu"), folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    monkeypatch.setattr(adapter_files, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"is an adapter .LORA. of {base}: install peft"):
        load_config(config)
    monkeypatch.undo()
    path.write_text(json.dumps({**fields, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ValueError, match="of type PREFIX_TUNING, which puts keys of its own into the cache"):
        load_config(config)
    path.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say what model it is for"):
        load_tokenizer(config)


def test_an_adapter_that_lacks_weights_is_refused(lora):
    _, folder = lora
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="the adapter .* cannot be loaded: Found missing adapter keys"):
        load_model(InferConfig(model=str(folder), device="cpu"))
