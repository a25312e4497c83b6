"""What a cache is refused for when it is made, from the configuration alone: before weights are loaded."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING, MistralConfig

from d2o_dist import D2OCache, D2OConfig
from tests.models import tiny_model

CAUSES = {
    "deepseek_v32": r"sparse attention \(index_topk 2048\)",
    "glm_moe_dsa": "sparse attention",
    "mamba": r"no attention layers that its configuration tells of \(num_attention_heads\)",
    "xlstm": "no attention layers",
    "rwkv": "no attention layers",
    "bamba": r"no layer with attention \(32 layers\)",
    "minimax": "a cache of its own kind",
    "qwen4_exp": "sparse attention",
    "recurrent_gemma": "states outside its cache",
    "unlimited_ocr": "windows that keep the prompt .*'reference_sliding_attention'",
    "gemma4_unified_assistant": "keys and values of another model in all of its layers",
    "mllama": "cross attention",
    "xlnet": "a cache of its own kind",
    "blip": "cross attention",
    "kosmos-2": "masks that it makes itself",
    "diffusion_gemma": "a decoder that draws many tokens at once, over the keys of another",
    "pi0": "actions for answers, and no text",
    "reformer": "a cache of its own kind",
    "t5gemma2": "an encoder beside its decoder",
    "bloom": r"attention beside transformers' attention interface \(BloomModel\)",
    "mpt": "attention beside transformers' attention interface",
    "falcon": "attention beside transformers' attention interface",
}


@pytest.mark.parametrize("model_type", CAUSES)
def test_the_cause_is_named_and_what_to_do(model_type):
    with pytest.raises(ValueError, match=f" has {CAUSES[model_type]}.*: use transformers' own cache"):
        D2OCache(config=CONFIG_MAPPING[model_type]())


def test_what_is_no_configuration_is_refused():
    with pytest.raises(ValueError, match=r"config is a model \(LlamaForCausalLM\): give D2OCache\(config=model.config"):
        D2OCache(config=tiny_model())
    with pytest.raises(ValueError, match="must be a model's configuration .*, not dict"):
        D2OCache(config={"num_hidden_layers": 4})


def test_windows_in_all_layers_leave_nothing_to_compress():
    config = MistralConfig(sliding_window=16, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"the model has sliding windows in all of its layers \(3\)"):
        D2OCache(config=config)
    assert [layer.is_sliding for layer in D2OCache(config=config, d2o=D2OConfig.preset("full")).layers] == [True] * 3
