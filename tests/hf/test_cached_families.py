"""The sweep over types of models: a few of them, its table, and that it fails where a type got worse."""

from __future__ import annotations

import json

import pytest

from tests import cached_families
from tests.cached_families import BEGIN, END, KINDS, MODEL_TYPES, PAGE, RECORD, outcome_of, tables, worse
from tests.families import Outcome

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))
# A window, experts, a bias, absolute positions, two parts of which one reads images, states; and some that are refused.
FEW = ["olmo3", "qwen3_moe", "gpt2", "opt", "cohere2_vision", "gpt_oss", "zamba2", "mamba", "gptj"]


@pytest.mark.parametrize("model_type", FEW)
def test_a_type_is_what_the_record_says(model_type):
    assert outcome_of(model_type).kind == RECORDED["types"][model_type]["kind"] in ("compressed", "refused")


def test_every_type_is_recorded_and_none_is_wrong_or_refused_late():
    kinds = {name: one["kind"] for name, one in RECORDED["types"].items()}
    assert set(kinds) >= set(MODEL_TYPES) and set(kinds.values()) == {"compressed", "refused"}
    assert list(kinds.values()).count("compressed") >= 190


def test_the_tables_of_the_page_are_those_of_the_record():
    assert f"{BEGIN}\n{tables(RECORDED)}\n{END}" in PAGE.read_text(encoding="utf-8")


def test_a_type_that_got_worse_is_found():
    before = {"a": {"kind": "compressed"}, "b": {"kind": "refused"}, "c": {"kind": "no reference"}}
    found = {"a": Outcome("refused", "why"), "b": Outcome("compressed", ""), "c": Outcome("no reference", "")}
    assert worse(found, before) == ["a was compressed, and is refused: why"]
    assert worse({"new": Outcome("wrong", "x")}, before) and not worse({"new": Outcome("refused", "x")}, before)
    assert KINDS[-1] == "wrong"


def test_a_cache_that_is_never_used_and_logits_that_differ_are_wrong(monkeypatch):
    model_class, config = cached_families.class_of("llama"), cached_families.tiny_config(
        cached_families.CONFIG_MAPPING["llama"]
    )
    expected = cached_families.reference_of(model_class, config)
    off = cached_families.Reference(expected.logits + 1e-3, expected.attention, expected.dtype)
    assert cached_families.serve(model_class, config, off).kind == "wrong"
    generated = cached_families.generated
    monkeypatch.setattr(cached_families, "generated", lambda model, **_: generated(model))
    assert cached_families.serve(model_class, config, expected).kind == "wrong"
