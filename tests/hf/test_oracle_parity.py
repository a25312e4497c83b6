"""`D2OCache` against the independent float64 oracle: what is kept, what is merged, what is generated."""

from __future__ import annotations

import pytest
import torch

from d2o_dist import D2OCache
from tests.models import tiny_model, tokens
from tests.oracle.naive_d2o import run_oracle, use_float64_norms
from tests.spec import pair

CASES = {
    "d2o": ("d2o", {}),
    "paper_minmax": ("paper_minmax", {}),
    "paper": ("paper", {}),
    "released": ("released", {"protected_layers": (0,)}),
    "mass": ("mass", {}),
    "span": ("span", {}),
    "reach": ("span", {"selection_reach": 6.5}),
    "roomy": ("reach", {"min_layer_tokens": 118}),  # nothing to evict at finalize; it grows first
    "h2o": ("h2o", {}),
    "snapkv": ("snapkv", {}),
    "pyramidkv": ("pyramidkv", {}),
    "values": ("paper_minmax", {"merge": "values", "eviction_interval": 3}),
    "none": ("paper_minmax", {"merge": "none", "dispersion": "heads_minmax", "eviction_interval": 5}),
    "mass_kept": ("mass", {"merge_targets": "kept", "gate": "threshold", "selection": "cumulative"}),
    "bounded": ("mass", {"max_decode_tail": 1, "eviction_interval": 6}),
    "mixed": ("mass", {"selection": "mixed", "eviction_interval": 4, "drop_quantile": 0.4}),
    "joint": ("reach", {"selection": "joint", "joint_share": 0.4, "eviction_interval": 5}),
    "average": ("h2o", {"selection": "average", "allocation": "profile", "profile": (1.0, 4.0, 2.0, 0.5)}),
    "tokens": ("paper_minmax", {"keep_tokens": 21}),
    "uneven": ("paper_minmax", {"dispersion_sign": 1, "temperature": 0.2, "min_layer_ratio": 0.1}),
    "protected": ("paper_minmax", {"keep_ratio": 0.6, "protected_layers": (0, -1)}),
    "own": ("paper_minmax", {"self_weight": 9.0, "eviction_interval": 4}),
    "strided": ("paper_minmax", {"score_queries": "strided", "score_query_stride": 4, "score_near_distance": 3}),
    "strided_mass": (
        "mass",
        {"selection": "mixed", "score_queries": "strided", "score_query_stride": 7, "score_near_distance": 16},
    ),
    "strided_only": (
        "h2o",
        {"score_queries": "strided", "score_query_stride": 40, "score_near_distance": 0, "rate_window": 5},
    ),
    "mean": ("paper_minmax", {"threshold_agg": "mean", "ema_beta": 0.3, "eviction_interval": 1, "heavy_fraction": 0.5}),
}


def both(case: str, **changes):
    """The same configuration for the library and for the oracle."""
    preset, overrides = CASES[case]
    overrides = {"keep_ratio": 0.3, "min_layer_tokens": 12, **overrides, **changes}
    return pair(preset, **overrides)


def assert_equal_slots(cache: D2OCache, snapshot, row: int = 0) -> None:
    for layer, expected in zip(cache.layers, snapshot, strict=True):
        count = layer.kv_len[row]
        assert torch.equal(layer.positions[row, :, :count], expected["positions"]), layer.index
        names = {"keys", "values", "log_mass", "scores", "rates"}
        names -= set() if cache.d2o.needs_column_sums else {"scores"}
        for name in sorted(names):
            found = getattr(layer, name)[row, :, :count]
            torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-11, msg=f"{layer.index} {name}")


FAMILIES = [("llama", 93, 38), ("qwen3", 110, 36), ("llama_mha", 57, 40)]
EVERYWHERE = ("d2o", "paper_minmax", "paper", "released", "mass", "reach", "strided")
RUNS = [
    pytest.param(*family, case, id=f"{case}-{family[0]}")
    for number, case in enumerate(CASES)
    for index, family in enumerate(FAMILIES)
    if case in EVERYWHERE or number % len(FAMILIES) == index
]
# Soft caps; sinks, whose share is in all statistics; values shorter than keys.
RUNS += [pytest.param(family, 71, 22, case, id=f"{case}-{family}")
         for family in ("gemma2", "gpt_oss", "mimo") for case in ("d2o", "paper_minmax", "strided_mass")]  # fmt: skip
# Latents: merged by mass, with and without their keys, and by the published code.
RUNS += [pytest.param("deepseek", 71, 22, case, id=f"{case}-deepseek")
         for case in ("d2o", "paper", "values", "released")]  # fmt: skip
TURNS = ["d2o", "paper_minmax", "mass", "reach", "snapkv", "tokens", "mixed", "joint", "strided", "strided_mass",
         "strided_only"]  # fmt: skip


@pytest.mark.parametrize("family, length, steps, case", RUNS)
def test_equals_the_oracle_after_prefill_and_decode(family, length, steps, case):
    model = use_float64_norms(tiny_model(family, seed=len(case)))
    ids = tokens(1, length, seed=length)
    config, oracle_config = both(case)
    expected = run_oracle(model, ids[0], oracle_config, steps)

    cache = D2OCache(config=model.config, d2o=config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.finalize()
    assert_equal_slots(cache, expected.after_finalize)
    report = cache.report()
    assert report.achieved_keep_ratio == pytest.approx(expected.achieved_ratio)

    cache = D2OCache(config=model.config, d2o=config)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=steps, do_sample=False,
                           return_dict_in_generate=True, output_logits=True)  # fmt: skip
    assert found.sequences[0, length:].tolist() == expected.tokens
    # generate hands logits out in float32
    torch.testing.assert_close(torch.cat(found.logits), expected.logits.float(), rtol=1e-5, atol=1e-5)
    for layer, snapshot, budget, threshold in zip(
        cache.layers, expected.final, expected.budgets, expected.thresholds, strict=True
    ):
        count = layer.kv_len[0]
        assert torch.equal(layer.positions[0, :, :count], snapshot["positions"])
        torch.testing.assert_close(layer.keys[0, :, :count], snapshot["keys"], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(layer.values[0, :, :count], snapshot["values"], rtol=1e-8, atol=1e-9)
        if layer.slot_budgets is not None:
            assert config.split(layer.slot_budgets[0]) == tuple(budget)
        if config.merge.merges and threshold is not None:
            assert float(layer.threshold[0]) == pytest.approx(threshold, rel=1e-9)


@pytest.mark.parametrize(
    ("family", "case"),
    [*(("llama", case) for case in TURNS), ("gemma2", "mixed"), ("gpt_oss", "mixed"), ("mimo", "paper_minmax"),
     ("deepseek", "mixed")],
)
def test_equals_the_oracle_over_a_chunked_prompt_and_a_later_turn(family, case):
    model = use_float64_norms(tiny_model(family, seed=3))
    first, second = tokens(1, 71, seed=5), tokens(1, 38, seed=6)
    config, oracle_config = both(case, eviction_interval=6)
    chunks = [29, 2, 40]
    one = run_oracle(model, first[0], oracle_config, 15, chunks=chunks)
    fed = torch.cat([torch.tensor(one.tokens[-1:]), second[0]])
    two = run_oracle(model, fed, oracle_config, 15, session=one.session, chunks=[20, 19])

    cache = D2OCache(config=model.config, d2o=config)
    with torch.no_grad():
        for chunk in first.split(chunks, dim=1):
            logits = model(chunk, past_key_values=cache).logits
        for token in one.tokens[:-1]:
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits
        assert int(logits[0, -1].argmax()) == one.tokens[-1]
        for chunk in fed[None].split([20, 19], dim=1):
            model(chunk, past_key_values=cache)
        cache.finalize()
        assert_equal_slots(cache, two.after_finalize)
        for token in two.tokens[:-1]:
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits
    assert int(logits[0, -1].argmax()) == two.tokens[-1]
    assert_equal_slots(cache, two.final)
