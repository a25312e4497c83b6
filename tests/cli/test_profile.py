"""`d2o-dist profile`, and `budget.rule: profile`, which reads what it wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.cli import infer, main
from d2o_dist.engine.profile import default_text, passages
from d2o_dist.models import profile
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.policy.budget import Dispersion, Uniform
from tests.cli.speak import speak
from tests.engine.tiny import make_folder
from tests.models import tiny_model, tokens

FIELDS = {"keep_ratio": 0.5, "budget": {"rule": "profile", "min_layer_tokens": 4}}
LENGTH = 60


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(profile.CACHE_ENV, str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "model", num_hidden_layers=4)


@pytest.fixture
def measured(folder, tmp_path):
    """The command on a text of one's own; (folder, line that it printed)."""
    text = tmp_path / "words.txt"
    text.write_text("the quick brown fox jumps over the lazy dog one two three four five " * 40)
    argv = ["profile", str(folder), "--text", str(text), "--tokens", str(LENGTH), "--passages", "3", "--device", "cpu"]
    status, out, err = speak(main.main, argv)
    assert (status, err) == (0, "")
    return folder, out


def test_shares_are_the_mean_of_dispersions_over_passages(measured):
    folder, out = measured
    values = json.loads((folder / profile.FILE).read_text())
    assert out.startswith(f"{folder / profile.FILE}: 4 layers, 3 passages of {LENGTH} tokens")
    assert values["measured"]["passages"] == 3 and len(values["measured"]["text_sha256"]) == 64
    assert sum(values["shares"]) == pytest.approx(1)
    # One passage by the rule itself, with exact sums.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="d2o")
    text = Path(values["measured"]["text"]).read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    wanted, exact = [], D2OConfig(budget=Dispersion(min_layers=0, min_layer_tokens=0), statistics={"query_stride": 1})
    for row in passages(ids, 3, LENGTH):
        cache = D2OCache(config=model.config, d2o=exact)
        with torch.no_grad():
            model(torch.tensor([row]), past_key_values=cache)
        cache.finalize()
        wanted.append(torch.tensor(cache.compressed.plans[0].log_weights, dtype=torch.float64).exp())
    torch.testing.assert_close(torch.tensor(values["shares"]).double(), torch.stack(wanted).mean(0), rtol=1e-5, atol=0)


def test_the_rule_takes_the_file_s_shares_and_measures_nothing(measured):
    folder, _ = measured
    shares = json.loads((folder / profile.FILE).read_text())["shares"]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="d2o")
    ids, kept = tokens(1, 90), []
    for budget in ({"rule": "profile"}, {"rule": "profile", "shares": shares}):
        d2o = D2OConfig.from_dict({**FIELDS, "budget": {**FIELDS["budget"], **budget}})
        cache = D2OCache(config=model.config, d2o=d2o)
        assert not cache.d2o.needs_column_sums and cache.d2o.budget.is_known_before
        with torch.no_grad():
            model(ids, past_key_values=cache)
        cache.finalize()
        kept.append([layer.slot_budgets[0] for layer in cache.layers])
    assert kept[0] == kept[1] and sum(kept[0]) == 45 * 4
    assert [slots / 180 for slots in kept[0]] == pytest.approx(shares, abs=1 / 180)
    assert not Dispersion().is_known_before and Uniform().is_known_before


def test_a_missing_profile_is_refused_before_weights_are_loaded(folder):
    (folder / "model.safetensors").write_bytes(b"no weights")
    argv = ["--model", str(folder), "--prompt", "one two", "device=cpu", "d2o.budget.rule=profile"]
    status, out, err = speak(infer.main, argv)
    assert status == 2 and f"run `d2o-dist profile {folder}`" in err and out == ""
    with pytest.raises(ValueError, match="it is not known where this model is from: give budget.shares"):
        D2OCache(config=tiny_model().config, d2o=D2OConfig(budget="profile"))


def test_another_model_s_profile_and_damage_are_refused(measured):
    folder, _ = measured
    file, config = folder / profile.FILE, folder / "config.json"
    config.write_text(config.read_text().replace("}", "  }", 1))
    with pytest.raises(ValueError, match="was measured on other files than .* run `d2o-dist profile .*` again"):
        profile.read_profile(str(folder))
    for text in ("{", "[]", '{"model": 1, "shares": [0], "measured": {}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="cannot be read .* again"):
            profile.read_profile(str(folder))


def test_where_the_folder_cannot_be_written_it_lies_in_the_user_s_cache(folder, tmp_path, monkeypatch):
    """As on a shared file system that is read only; a stale file there does not hide it."""
    (folder / profile.FILE).write_text('{"model": "of old", "shares": [1, 1, 1, 1], "measured": {}}')
    found = profile.ModelProfile(profile.identity_of(str(folder)), (0.1, 0.2, 0.3, 0.4), {})
    replace = os.replace

    def read_only(source, target):
        if Path(target).parent == folder:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(profile.os, "replace", read_only)
    path = profile.write_profile(str(folder), found)
    assert path.parent == tmp_path / "cache" / "profiles" and profile.read_profile(str(folder)) == found
    assert sorted(one.name for one in folder.glob("*profile*")) == [profile.FILE]


@pytest.mark.parametrize("num_full", [3, 6, 24])
def test_models_with_few_full_layers(num_full):
    """Windows take no part, floors hold, and the total is met."""
    kinds = ["full_attention", "sliding_attention"] * num_full
    sizes = {"num_hidden_layers": len(kinds), "layer_types": kinds}
    model, shares = tiny_model("mistral_sliding", **sizes), list(range(1, num_full + 1))
    floors = {"min_layer_ratio": 0.15, "min_layer_tokens": 8}
    d2o = D2OConfig(keep_ratio=0.2, budget={"rule": "profile", "shares": shares, **floors})
    cache = D2OCache(config=model.config, d2o=d2o)
    with torch.no_grad():
        model(tokens(1, 100), past_key_values=cache)
    cache.finalize()
    slots = [layer.slot_budgets[0] for layer in cache.layers if not layer.is_sliding]
    assert len(slots) == num_full and sum(slots) == 20 * num_full and min(slots) >= 15 and slots == sorted(slots)
    with pytest.raises(ValueError, match=f"budget.shares has 2 numbers, but the model has {num_full} layers with full"):
        D2OCache(config=model.config, d2o=d2o.replace(budget={"shares": (1, 2)}))


def test_texts_and_passages():
    assert passages(range(10), 3, 2) == [[0, 1], [3, 4], [6, 7]]
    assert passages(range(10), 9, 4) == [[0, 1, 2, 3], [5, 6, 7, 8]]
    with pytest.raises(ValueError, match="the text has 3 tokens, but a passage has 4"):
        passages(range(3), 1, 4)
    assert len(default_text()) > 100_000


def test_the_shape_says_where_a_model_is_from(folder):
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert shape_of(config).source == str(folder) and shape_of(tiny_model().config).source is None
