"""Does the oracle itself say what the specification says? Tiny random models, uneven attention, float64."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from .naive_cache import OracleCache
from .naive_d2o import PRESETS, OracleConfig, OracleSession, one_thread, run_oracle, use_float64_norms
from .naive_slots import Slot
from .naive_softmax import OracleSoftmax
from .published_step import PublishedStep

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # attention far from uniform
    "attn_implementation": "sdpa",  # eager attention takes its softmax in float32
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    return use_float64_norms(model.double().eval())


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def preset(name: str, **overrides) -> OracleConfig:
    """A preset that squeezes short prompts, at a ratio that three protected layers of four leave room for."""
    defaults = {"min_layer_tokens": 12, "eviction_interval": 4, "keep_ratio": 0.4}
    if "keep_tokens" in overrides:
        del defaults["keep_ratio"]
    return OracleConfig.preset(name, **{**defaults, **overrides})


SQUEEZING = [name for name in PRESETS if name != "full"]


# -- the model around the cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, [17, 20, 3]])
def test_without_eviction_it_is_the_model(model, chunks):
    ids = prompt(40)
    result = run_oracle(model, ids, OracleConfig.preset("full"), 8, chunks=chunks)
    reference = list(ids)
    for step in range(8):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([reference])).logits[0, -1]
        assert torch.allclose(result.logits[step], logits, rtol=0, atol=1e-10)
        assert int(logits.argmax()) == result.tokens[step]
        reference.append(int(logits.argmax()))
    assert result.achieved_ratio == 1.0


def test_a_later_turn_without_eviction_is_the_model(model):
    ids, turn = prompt(30), prompt(9, seed=2)
    first = run_oracle(model, ids, OracleConfig.preset("full"), 4)
    second = run_oracle(model, turn, OracleConfig.preset("full"), 3, chunks=[4, 5], session=first.session)
    reference = ids + first.tokens[:3] + turn
    for step in range(3):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([reference])).logits[0, -1]
        assert torch.allclose(second.logits[step], logits, rtol=0, atol=1e-10)
        reference.append(second.tokens[step])


@pytest.mark.parametrize("name", SQUEEZING)
def test_chunks_change_nothing(model, name):
    whole = run_oracle(model, prompt(60), preset(name), 10)
    parts = run_oracle(model, prompt(60), preset(name), 10, chunks=[2, 31, 27])
    assert whole.tokens == parts.tokens and whole.budgets == parts.budgets
    assert torch.allclose(whole.logits, parts.logits, atol=1e-9)
    for ours, theirs in zip(whole.final, parts.final, strict=True):
        assert torch.equal(ours["positions"], theirs["positions"])
        for field in ("keys", "values", "scores", "rates", "log_mass"):
            assert torch.allclose(ours[field], theirs[field], atol=1e-9)


# -- section 1 --------------------------------------------------------------------------------------------------------


def test_column_sums_sum_to_the_prompt(model):
    result = run_oracle(model, prompt(50), preset("paper_minmax"), 1, chunks=[20, 30])
    for sums in result.column_sums:
        assert sums.shape == (4, 50)
        assert torch.allclose(sums.sum(dim=1), torch.full((4,), 50.0, dtype=torch.float64))
        assert float(sums.var(dim=1).max()) > 1  # uneven, or these tests would test little


@pytest.mark.parametrize("name", SQUEEZING)
def test_scores_are_conserved_until_eviction(model, name):
    """Every query spreads a mass of one per query head: 4 query heads, 40 prompt queries and 5 decode steps."""
    config = preset(name, keep_ratio=1.0, eviction_interval=None)
    result = run_oracle(model, prompt(40), config, 6)
    for layer in range(4):
        if sum(result.budgets[layer]) >= 40:  # `released` does not meet its total, so its middle layer evicts
            assert float(result.final[layer]["scores"].sum()) == pytest.approx(4 * 45)


# -- section 2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SQUEEZING if name != "released"])
@pytest.mark.parametrize("keep_ratio", [0.15, 0.37, 0.8])
def test_the_ratio_is_never_exceeded(model, name, keep_ratio):
    result = run_oracle(model, prompt(90), preset(name, keep_ratio=keep_ratio, min_layer_tokens=0), 1)
    slots = [sum(b) for b in result.budgets]
    assert sum(slots) == math.floor(keep_ratio * 4 * 90 + 1e-9)
    assert result.achieved_ratio <= keep_ratio
    assert [entry["positions"].shape[1] for entry in result.after_finalize] == slots


# -- sections 3 and 5 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SQUEEZING)
def test_what_is_kept(model, name):
    config = preset(name)
    result = run_oracle(model, prompt(70), config, 15)
    protected = {layer % 4 for layer in config.protected_layers}
    assert result.evictions and (config.merge == "none" or any(any(m) for e in result.evictions for m in e.merged))
    for layer, (heavy, recent) in enumerate(result.budgets):
        early, late = result.after_finalize[layer], result.final[layer]
        if layer in protected:
            assert late["positions"].tolist() == [list(range(84))] * 2
            continue
        assert early["positions"].shape[1] == heavy + recent
        assert heavy + recent <= late["positions"].shape[1] < heavy + recent + 4
        for entry, seen in ((early, 70), (late, 84)):
            for head in entry["positions"].tolist():
                assert head == sorted(set(head))
                assert head[:4] == [0, 1, 2, 3] and head[-recent:] == list(range(seen - recent, seen))
    for eviction in result.evictions:
        for head in eviction.evicted:
            assert len(head) == len(eviction.evicted[0]) > 0


def test_kept_scores_are_the_largest(model):
    result = run_oracle(model, prompt(70), preset("h2o"), 1)
    for layer, (heavy, recent) in enumerate(result.budgets):
        scores = result.column_sums[layer].reshape(2, 2, 70).sum(dim=1)
        for head in range(2):
            best = sorted(range(4, 70 - recent), key=lambda j: (-float(scores[head, j]), j))[: heavy - 4]
            kept = [0, 1, 2, 3, *sorted(best), *range(70 - recent, 70)]
            assert result.after_finalize[layer]["positions"][head].tolist() == kept


def test_streaming_is_sinks_and_recent(model):
    result = run_oracle(model, prompt(50), preset("streaming", eviction_interval=1), 10)
    for (heavy, recent), entry in zip(result.budgets, result.final, strict=True):
        newest = range(59 - (heavy + recent - 4), 59)
        assert entry["positions"].tolist() == [[0, 1, 2, 3, *newest]] * 2


def test_a_later_turn_gets_new_budgets(model):
    first = run_oracle(model, prompt(60), preset("paper_minmax"), 5)
    second = run_oracle(model, prompt(40, seed=3), preset("paper_minmax"), 5, chunks=[25, 15], session=first.session)
    assert sum(sum(b) for b in second.budgets) == math.floor(0.4 * 4 * 104 + 1e-9)  # 60 + 4 decoded + 40
    assert second.ratios == first.ratios
    fixed = run_oracle(model, prompt(60), preset("paper_minmax", keep_tokens=24), 5)
    again = run_oracle(model, prompt(40, seed=3), preset("paper_minmax"), 5, session=fixed.session)
    assert again.budgets == fixed.budgets and sum(sum(b) for b in fixed.budgets) == 96


def test_the_later_turns_rates(model):
    """Rates are the mean over the turn's own last queries, so they sum to the group's query heads."""
    config = OracleConfig.preset("full", rate_window=6)
    first = run_oracle(model, prompt(30), config, 3)
    for length in (4, 9):
        result = run_oracle(model, prompt(length, seed=length), config, 1, session=first.session)
        for entry in result.after_finalize:
            assert torch.allclose(entry["rates"].sum(dim=1), torch.full((2,), 2.0, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("name", SQUEEZING)
def test_short_prompts_and_single_tokens(model, name):
    for length in (1, 2, 5, 13):
        config = preset(name, eviction_interval=2)
        result = run_oracle(model, prompt(length), config, 12)
        assert len(result.tokens) == 12 and torch.isfinite(result.logits).all()


# -- section 4 --------------------------------------------------------------------------------------------------------


def hand_cache(config: OracleConfig, keys: list, scores: list[float], rates: list[float], budget: tuple) -> OracleCache:
    """One layer, one head; the value of a slot is its key plus 10."""
    cache = OracleCache(config, 1, 1, 1)
    cache.budgets = [budget]
    cache.num_seen_tokens = len(keys)
    for position, key in enumerate(keys):
        key = torch.tensor(key, dtype=torch.float64)
        cache.slots[0][0].append(Slot(key, key + 10, position, scores[position], rates[position]))
    return cache


# A sink, two candidates (of which the second goes: nearest the third), two recent.
KEYS = [[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]


def hand_config(**overrides) -> OracleConfig:
    return OracleConfig(keep_ratio=0.5, num_sink_tokens=1, **overrides)


def test_the_merge_by_hand():
    cache = hand_cache(hand_config(), KEYS, [0, 5, 1, 0, 0], [1.0] * 5, (2, 2))
    cache.evict(0, pooled=True)
    u = math.sqrt(0.5)  # to the sink, to 1 and to 3 alike up to rounding: whichever it was
    assert cache.thresholds == [pytest.approx(u)]
    (eviction,) = cache.evictions
    assert eviction.evicted == [[2]] and eviction.merged == [[True]]
    (target,) = eviction.target[0]
    slot = next(s for s in cache.slots[0][0] if s.position == target)
    key = torch.tensor(KEYS[target]).double()
    expected = (math.e * key + math.exp(u) * torch.ones(2)) / (math.e + math.exp(u))
    assert torch.allclose(slot.key, expected) and torch.allclose(slot.value, expected + 10)
    # Later: tau = 0.7 * max + 0.3 * tau; the next to go is the slot just above, far from it: dropped.
    cache.thresholds = [1.5]
    cache.budgets = [(1, 2)]
    cache.evict(0, pooled=False)
    best = max(cache.evictions[1].similarity[0])
    assert cache.thresholds == [pytest.approx(0.7 * best + 0.3 * 1.5)]
    assert cache.evictions[1].merged == [[False]]


def test_ties_keep_the_lower_position():
    cache = hand_cache(hand_config(merge="none"), KEYS, [0, 1, 1, 1, 1], [1.0] * 5, (2, 2))
    cache.evict(0, pooled=True)
    assert [s.position for s in cache.slots[0][0]] == [0, 1, 3, 4]


def test_the_mass_merge_by_hand():
    config = hand_config(merge="mass", merge_targets="kept", gate="quantile", drop_quantile=0.0)
    keys = [[1.0, 1.0], [0.0, 2.0], [0.1, 1.0], [1.0, 0.1], [-1.0, 0.0]]
    cache = hand_cache(config, keys, [0, 5, 1, 0, 0], [1.0, 3.0, 1.0, 0.5, 0.5], (2, 2))
    cache.evict(0, pooled=True)
    slot = cache.slots[0][0][1]
    assert cache.evictions[0].target == [[1]]
    assert slot.rate == 4 and slot.log_mass == pytest.approx(math.log(4 / 3))
    assert slot.key.tolist() == [0.0, 2.0] and slot.value.tolist() == pytest.approx([10.025, 11.75])
    assert slot.score == 5


def test_mass_merge_keeps_the_output():
    """Where both keys are the same, and rates are what the query gives, the merged slot answers for both."""
    config = hand_config(merge="mass", gate="quantile", drop_quantile=0.0)
    keys = [[1.0, 1.0], [0.0, 2.0], [0.0, 2.0], [1.0, 0.1], [-1.0, 0.0]]
    query = torch.tensor([[[0.3, 0.7]]], dtype=torch.float64)
    cache = hand_cache(config, keys, [0, 5, 1, 0, 0], [0.0] * 5, (2, 2))
    before, probabilities = cache._attend(0, query, [5], OracleSoftmax(1.0))
    for i, slot in enumerate(cache.slots[0][0]):
        slot.rate = float(probabilities[0][0, i])
    cache.evict(0, pooled=True)
    assert torch.allclose(cache._attend(0, query, [5], OracleSoftmax(1.0))[0], before)


def test_tail_targets_are_the_lowest_ranked(model):
    result = run_oracle(model, prompt(70), preset("mass", keep_ratio=0.6), 1)
    for (heavy, recent), entry, eviction in zip(result.budgets, result.after_finalize, result.evictions, strict=True):
        count = max(1, math.floor(0.1 * (heavy + recent) + 1e-9))
        for head in range(2):
            touched = (entry["log_mass"][head] > 0).sum()
            assert 0 < touched <= count
            merged = sum(eviction.merged[head])
            assert set(entry["positions"][head][entry["log_mass"][head] > 0].tolist()) <= set(eviction.target[head])
            assert merged > 0
        merged = sum(sum(head) for head in eviction.merged)
        total = sum(len(head) for head in eviction.merged)
        assert merged == total - math.floor(0.25 * total)


# -- the published step -----------------------------------------------------------------------------------------------


def scatter_step(keys, values, scores, hh_size, recent_size, threshold=None):
    """The same by whole tensors, for a first eviction (threshold None) or a later one."""
    num_slots, dim = keys.shape[2:]
    ranked = scores[:, : num_slots - recent_size].clone()
    ranked[:, :4] = math.inf
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep.scatter_(1, ranked.argsort(dim=-1, descending=True, stable=True)[:, :hh_size], True)
    keep[:, num_slots - recent_size :] = True

    def split(x, mask):
        return x[0][mask].view(1, x.shape[1], -1, dim)

    unit = torch.nn.functional.normalize
    u, nearest = (unit(split(keys, ~keep), dim=-1) @ unit(split(keys, keep), dim=-1).mT).max(dim=-1)
    threshold = u.mean() if threshold is None else 0.5 * threshold + 0.5 * u.mean()
    rows = u.mean(dim=1)[0] >= threshold
    index = nearest[..., rows, None].expand(-1, -1, -1, dim)
    merged = [
        split(x, keep).scatter_reduce(2, index, u[..., rows, None] * split(x, ~keep)[..., rows, :], "mean")
        for x in (keys, values)
    ]
    return merged[0], merged[1], float(threshold)


@pytest.mark.parametrize("shape", [(3, 30, 8), (6, 50, 5), (1, 20, 16)])
def test_published_step(shape):
    heads, slots, dim = shape
    random = torch.Generator().manual_seed(sum(shape))
    keys, values = torch.randn(2, 1, heads, slots, dim, generator=random, dtype=torch.float64).unbind()
    scores = torch.rand(heads, slots, generator=random, dtype=torch.float64)
    step = PublishedStep()
    ours = step(keys, values, scores, 8, 5)
    theirs = scatter_step(keys, values, scores, 8, 5)
    assert torch.allclose(ours[0], theirs[0]) and torch.allclose(ours[1], theirs[1])
    assert step.threshold == pytest.approx(theirs[2]) and step.scores.shape == (heads, 13)
    # Second step: one new slot a head.
    new = torch.randn(2, 1, heads, 1, dim, generator=random, dtype=torch.float64)
    keys, values = (torch.cat([old, extra], dim=2) for old, extra in zip(ours, new, strict=True))
    scores = torch.rand(heads, 14, generator=random, dtype=torch.float64)
    total = scores.clone()
    total[:, :-1] += step.scores
    again = step(keys, values, scores, 8, 5)
    expected = scatter_step(keys, values, total, 8, 5, theirs[2])
    assert torch.allclose(again[0], expected[0]) and torch.allclose(again[1], expected[1])
    assert step.threshold == pytest.approx(expected[2])


@pytest.mark.parametrize("later", [False, True])
def test_released_merge_is_the_published_step(later):
    random = torch.Generator().manual_seed(5)
    keys, values = torch.randn(2, 1, 4, 40, 8, generator=random, dtype=torch.float64).unbind()
    scores = torch.rand(4, 40, generator=random, dtype=torch.float64)
    cache = OracleCache(OracleConfig.preset("released", keep_ratio=0.5, protected_layers=[]), 1, 4, 4)
    cache._append(0, keys[0], values[0], list(range(40)))
    for head in range(4):
        for slot, score in zip(cache.slots[0][head], scores[head], strict=True):
            slot.score = float(score)
    cache.budgets, cache.num_seen_tokens = [(10, 10)], 40
    step = PublishedStep()
    if later:
        cache.thresholds, step.threshold = [0.3], 0.3
    new_keys, new_values = step(keys, values, scores, 10, 10)
    cache.evict(0, pooled=False)
    (entry,) = cache.snapshot()
    assert any(cache.evictions[0].merged[0])
    assert torch.allclose(entry["keys"], new_keys[0]) and torch.allclose(entry["values"], new_values[0])
    assert cache.thresholds == [pytest.approx(step.threshold)]


def test_float32_models_run_in_float64():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    session = OracleSession(model, OracleConfig.preset("full"))
    logits = session.feed(prompt(10))
    assert logits.dtype == torch.float64 and model.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(model(input_ids=torch.tensor([prompt(10)])).logits[0].double(), logits, atol=1e-2)
