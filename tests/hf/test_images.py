"""Models whose image tokens attend to each other both ways within a prompt, with images."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

from d2o_dist import D2OCache, D2OConfig
from tests.families import VARIANTS, build, tiny_config
from tests.tiny_types import CHANGES, class_of

IMAGE = 97


@cache
def model_of(model_type: str, attention: str):
    leave, changes = VARIANTS[0]
    fields = {"mm_tokens_per_image": 16, **changes, **CHANGES.get(model_type, {})}
    config = tiny_config(CONFIG_MAPPING[model_type], fields, leave)
    given = attention if attention != "d2o" else {"text_config": "d2o", "vision_config": "sdpa"}
    return build(class_of(model_type), config, given)


def prompt(model_type: str) -> dict[str, torch.Tensor]:
    """Two rows with an image of 16 tokens each, the second padded on the left."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 80, (2, 30), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, 6:22] = ids[1, 10:26] = IMAGE
    mask[1, :5] = ids[1, :5] = 0
    types = (ids == IMAGE).long()
    if model_type == "paligemma":  # all of the prompt sees all of it; a suffix would have type 1
        types = torch.zeros_like(ids)
    pixels = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "pixel_values": pixels}


def generated(model, **given):
    out = model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True,
                         return_dict_in_generate=True)  # fmt: skip
    return torch.stack(out.logits, 1).double()


@pytest.mark.parametrize("model_type", ["gemma3", "paligemma"])
def test_images_are_read_as_transformers_reads_them(model_type):
    model, own = model_of(model_type, "d2o"), model_of(model_type, "sdpa")
    given = prompt(model_type)
    expected = generated(own, **given, past_key_values=DynamicCache(config=own.config))
    text = {name: value for name, value in given.items() if name != "token_type_ids"}
    causal = generated(own, **text, token_type_ids=torch.ones_like(given["input_ids"]) * (model_type == "paligemma"))
    assert (causal - expected).abs().max() > 1e-3  # so that it matters
    full = D2OCache(config=model.config, d2o=D2OConfig(keep_ratio=1.0))
    torch.testing.assert_close(generated(model, **given, past_key_values=full), expected, rtol=1e-5, atol=1e-5)
    part = D2OConfig(keep_ratio=0.4, eviction_interval=2, budget={"min_layers": 0, "min_layer_tokens": 2})
    both, alone = (D2OCache(config=model.config, d2o=part) for _ in range(2))
    found = generated(model, **given, past_key_values=both)
    row = {name: value[1:] if name == "pixel_values" else value[1:, 5:] for name, value in given.items()}
    torch.testing.assert_close(found[1:], generated(model, **row, past_key_values=alone), rtol=1e-5, atol=1e-5)
    assert both.report().achieved_keep_ratio < 0.5
