"""Any tp x sp, any scheme and layout: kept positions, budgets, thresholds and tokens are those of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from d2o_dist.config.parallel import ParallelConfig
from tests.models import windowed
from tests.ranks import run_ranks
from tests.sharded.play import Play, assert_same, on_rank, play
from tests.spec import PRESETS

pytestmark = pytest.mark.multirank

LAYOUTS = {
    "heads": {"sp_prefill": "ulysses", "cache_layout": "heads"},
    "moved": {"sp_prefill": "ulysses", "cache_layout": "sequence"},
    "allgather": {"sp_prefill": "allgather"},
    "ring": {"sp_prefill": "ring"},
}
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4}
LAYERS = {"gemma3": 4}  # as the layer types of its tiny model
_SUMS_AND_RATES = {"preset": "paper_minmax", "d2o": {"selection": "mixed", "merge": "mass"}, "steps": 18}
_wanted: dict[str, dict] = {}


def check(one: Play, parallel: ParallelConfig, tolerance: float = 1e-10) -> list[dict]:
    """Run on the ranks, compare every rank's account with one process; the ranks' traffic.

    Presets that evict once in 16 tokens do so once in 8 here: three times in the tokens of a play.
    """
    if "eviction_interval" not in PRESETS[one.preset]:
        one = replace(one, d2o={"eviction_interval": 8, **one.d2o})
    if repr(one) not in _wanted:
        _wanted[repr(one)] = play(one)
    wanted = _wanted[repr(one)]
    # Both engines leave state behind: DTensor's caches outlive the process groups that they name.
    results = run_ranks(parallel.sp * parallel.tp, on_rank, one, parallel, fresh=parallel.tp > 1)
    for found, _ in results:
        assert_same(found, wanted, tolerance)
    return [traffic for _, traffic in results]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tp", "sp"), [(1, 2), (1, 3), (1, 4), (2, 2)], ids=str)
def test_meshes(tp, sp, layout):
    """At least 64 decoded tokens, ragged prompts that the ranks do not divide."""
    one = Play(lengths=(97, 61), steps=66, model=WIDE)
    check(one, ParallelConfig(tp=tp, sp=sp, tp_engine="transformers", **LAYOUTS[layout]))


@pytest.mark.parametrize("engine", ["transformers", "deepspeed"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_ranks(tp, heads, engine):
    """As many KV heads as ranks, or more, or fewer: then each is copied, and the copies agree."""
    model = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    one = Play(preset="mass", lengths=(61, 40), steps=66 if tp == 2 else 34, model=model)
    check(one, ParallelConfig(tp=tp, tp_engine=engine, check_replicas=True))


@pytest.mark.parametrize("layout", ["allgather", "ring"])
def test_copied_heads_and_token_shards(layout):
    one = Play(preset="mass", lengths=(61, 40), model={"num_key_value_heads": 1}, turn=(30, 19))
    check(one, ParallelConfig(tp=2, sp=2, tp_engine="transformers", check_replicas=True, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("preset", "d2o"),
    [
        ("paper", {}),
        ("released", {"protected_layers": (0,)}),
        ("mass", {"eviction_interval": 5}),
        ("mass", {"merge_targets": "kept", "gate": "threshold"}),
        ("span", {}),
        ("span", {"max_decode_tail": 2, "eviction_interval": 7}),
        ("span", {"selection_reach": 6.5}),
        ("reach", {"selection": "joint", "joint_share": 0.6, "allocation": "profile", "profile": (1.0, 3.0, 2.0)}),
        ("reach", {"min_layer_tokens": 104, "eviction_interval": 7}),
        ("snapkv", {}),
        ("pyramidkv", {}),
        ("h2o", {}),
        ("streaming", {}),
        ("full", {}),
        ("paper_minmax", {}),
        ("paper_minmax", {"selection": "mixed", "merge": "values", "threshold_agg": "mean"}),
        ("paper_minmax", {"keep_ratio": None, "keep_tokens": 30, "eviction_interval": None}),
    ],
    ids=str,
)
def test_rules(preset, d2o, layout):
    """Whatever ranks, gates and merges."""
    check(Play(preset=preset, lengths=(90,), d2o=d2o), ParallelConfig(sp=2, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["d2o", "paper_minmax", "released"])
def test_later_turns_and_rows_that_end(preset, layout):
    """A second turn over what is held; one row ends, is fed padding, and leaves."""
    extra = {"protected_layers": (0,)} if preset == "released" else {}
    one = Play(preset=preset, lengths=(60, 33, 50), turn=(41, 50, 7), ends=(1,), steps=10, d2o=extra)
    check(one, ParallelConfig(sp=2, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_in_chunks(layout):
    check(Play(lengths=(61, 97), chunk=20, turn=(33, 40)), ParallelConfig(sp=2, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reach_across_shards_chunks_and_turns(layout):
    """What a token passes on crosses from rank to rank, and over the gaps that the first turn's evictions left."""
    one = Play(lengths=(61, 97), chunk=20, turn=(33, 40), steps=18, d2o={"selection_reach": 9.0})
    check(one, ParallelConfig(sp=3 if layout in ("allgather", "ring") else 2, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("stride", "near", "extra"),
    [
        (5, 9, {"chunk": 20}),
        (4, 30, {}),  # near pairs across the shards of several ranks
        (8, 3, {"preset": "mass", "d2o": {"selection": "mixed"}}),
        (50, 0, {"preset": "h2o", "d2o": {"rate_window": 4}}),  # more queries at the end than rates need
    ],
    ids=str,
)
def test_sampled_queries(stride, near, extra, layout):
    """Column sums from the same queries wherever they are: ragged rows, chunks, a second turn."""
    d2o = {"score_queries": "strided", "score_query_stride": stride, "score_near_distance": near}
    extra = {"preset": "paper_minmax", **extra, "d2o": d2o | extra.get("d2o", {})}
    one = Play(lengths=(61, 97), turn=(33, 40), steps=10, **extra)
    sp = 3 if layout in ("allgather", "ring") and near == 30 else 2
    check(one, ParallelConfig(sp=sp, **LAYOUTS[layout]))


def test_sampled_queries_of_copied_heads():
    d2o = {"score_queries": "strided", "score_query_stride": 6, "score_near_distance": 4}
    model = {"num_key_value_heads": 1}
    one = Play(preset="paper_minmax", lengths=(61, 40), model=model, turn=(30, 19), steps=10, d2o=d2o)
    check(one, ParallelConfig(tp=2, sp=2, tp_engine="transformers", check_replicas=True, sp_prefill="ring"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [(1,), (2,), (5, 1)], ids=str)
def test_prompts_shorter_than_the_ranks(lengths, layout):
    """Some ranks have no token at all; then the cache grows on all of them."""
    one = Play(lengths=lengths, model=WIDE, d2o={"keep_ratio": None, "keep_tokens": 12})
    check(one, ParallelConfig(sp=3, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama_mha", "mistral_sliding", "qwen2", "qwen3", "phi3", "gemma3"])
def test_families(family, layout):
    one = Play(family=family, lengths=(90, 71), turn=(20, 31), steps=18, layers=LAYERS.get(family, Play.layers))
    check(one, ParallelConfig(sp=2, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mimo"])
def test_soft_caps_sinks_and_short_values(family, layout):
    """A sink is in the denominator once, whoever has the slots, and each rank has those of its heads."""
    one = Play(family=family, lengths=(90, 71), turn=(20, 31), model=windowed(family), **_SUMS_AND_RATES)
    check(one, ParallelConfig(sp=2, **LAYOUTS[layout]))


@pytest.mark.parametrize("family", ["gemma2", "granite_swa", "mimo"])
def test_soft_caps_sinks_and_short_values_of_tensor_ranks(family):
    one = Play(family=family, lengths=(61, 40), model=windowed(family), **_SUMS_AND_RATES)
    check(one, ParallelConfig(tp=2, tp_engine="transformers"))


@pytest.mark.parametrize("ranks", [{"sp": 2, "sp_prefill": "allgather"}, {"sp": 2, "sp_prefill": "ring"}, {"tp": 2}],
                         ids=str)  # fmt: skip
def test_latents(ranks):
    """One KV head: its slots are spread over sequence ranks, and every tensor rank has them."""
    one = Play(family="deepseek", lengths=(61, 40), turn=(20, 31), **_SUMS_AND_RATES)
    check(one, ParallelConfig(**ranks, tp_engine="transformers", check_replicas=True))
@pytest.mark.parametrize(
    ("parallel", "reading"),
    [
        (ParallelConfig(sp=2, **LAYOUTS["moved"]), "whole"),
        (ParallelConfig(sp=3, **LAYOUTS["ring"]), "layerwise"),
        (ParallelConfig(tp=2, tp_engine="transformers"), "whole"),
    ],
    ids=["moved", "ring", "tensor"],
)
def test_chunked_attention(parallel, reading):
    """Every rank holds the chunk; queries of other layers grow with the text, which no rank sees whole."""
    one = Play(family="llama4", lengths=(61, 48), chunk=20, turn=(20, 31), steps=18, layers=4, reading=reading)
    check(one, parallel)


@pytest.mark.parametrize(("family", "heads"), [("gemma4", 2), ("gemma3n", 1)])
def test_layers_that_share_keys_on_tensor_ranks(family, heads):
    one = Play(family=family, lengths=(61, 40), turn=(20, 31), layers=6, model={"num_key_value_heads": heads},
               **_SUMS_AND_RATES)  # fmt: skip
    check(one, ParallelConfig(tp=2, tp_engine="transformers"))


def test_heads_that_the_ranks_do_not_divide():
    """3 KV heads on 2 ranks: 2 and 1."""
    model = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    for layout in ("heads", "moved"):
        check(Play(lengths=(61, 97), model=model), ParallelConfig(sp=2, **LAYOUTS[layout]))


def test_the_same_from_other_seeds_and_window_longer_than_the_text():
    for seed in (1, 2):
        one = Play(preset="mass", lengths=(25, 31), seed=seed, d2o={"rate_window": 64})
        check(one, ParallelConfig(sp=3, sp_prefill="ring"))
