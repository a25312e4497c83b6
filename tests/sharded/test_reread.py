"""Prompts that are read twice, budgets of heads and budgets by rank, over ranks: what one process decides."""

from __future__ import annotations

import pytest

from d2o_dist.config.parallel import ParallelConfig
from tests.sharded.play import Play
from tests.sharded.test_parity import check

pytestmark = pytest.mark.multirank

DROP = {"merge": "none", "merge_targets": "kept", "gate": "threshold"}
# Every way to rank, to share, and to merge that only these configurations have.
RULES = {
    "reread": {},
    "chunks": {"reread_chunk": 25, "eviction_interval": 5},
    "drop": DROP,
    "by layers": {"budget_per": "layer", "reread_chunk": 40},
    "dynamic layers": {"budget_per": "layer", "allocation": "dynamic", **DROP},
    "dynamic heads": {"selection": "cumulative", "allocation": "dynamic", "temperature": 0.3, "merge": "keys_values",
                      "merge_targets": "kept", "gate": "threshold"},
    "uniform heads": {"selection": "window", "allocation": "uniform", "protected_layers": (1,), "keep_ratio": 0.5},
    "ranked by rate": {"selection": "window", "eviction_interval": 4},
    "ranked by sums": {"selection": "mixed", "budget_per": "layer", "score_queries": "strided"},
    "tokens": {"keep_ratio": None, "keep_tokens": 50, "eviction_interval": 3},
    "full": {"keep_ratio": 1.0, "eviction_interval": None},
}  # fmt: skip
SHORT = {"tokens": (61, 12)}  # budgets beyond a prompt: heads are then due at different times


def heads(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "hidden_size": 16 * num_heads}


@pytest.mark.parametrize(
    ("tp", "kinds", "engine"),
    [(2, (4, 2), "deepspeed"), (3, (6, 3), "transformers"), (4, (8, 4), "transformers"), (2, (4, 4), "transformers"),
     (3, (6, 1), "transformers"), (4, (8, 2), "deepspeed")],
    ids=str,
)  # fmt: skip
def test_tensor_ranks(tp, kinds, engine):
    """One KV head a rank, two, or copies of one: ragged prompts in chunks, a second turn."""
    one = Play(preset="reread", lengths=(61, 40), steps=34, chunk=23, turn=(9, 14), model=heads(*kinds),
               d2o={"reread_chunk": 27, "eviction_interval": 5})  # fmt: skip
    check(one, ParallelConfig(tp=tp, tp_engine=engine, check_replicas=True))


@pytest.mark.parametrize("kinds", [(4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_rules_on_tensor_ranks(rule, kinds):
    """With a KV head for each rank, and with copies of one."""
    one = Play(preset="reread", lengths=SHORT.get(rule, (70, 33)), turn=(12, 5), steps=20, model=heads(*kinds),
               d2o=RULES[rule], ends=(1,))  # fmt: skip
    check(one, ParallelConfig(tp=2, tp_engine="transformers", check_replicas=True))


@pytest.mark.parametrize("lengths", [(1,), (2,), (5, 1)], ids=str)
def test_prompts_of_a_few_tokens_on_tensor_ranks(lengths):
    """Copies that get no query of a second reading at all."""
    one = Play(preset="reread", lengths=lengths, model=heads(6, 1), d2o={"keep_ratio": None, "keep_tokens": 12})
    check(one, ParallelConfig(tp=3, tp_engine="transformers", check_replicas=True))


@pytest.mark.parametrize("family", ["llama_mha", "mistral_sliding", "qwen2", "qwen3", "gemma3"])
def test_families_on_tensor_ranks(family):
    one = Play(family=family, preset="reread", lengths=(60, 41), turn=(20, 31), steps=20)
    check(one, ParallelConfig(tp=2, tp_engine="transformers"))
