"""Whole steps on one process: recomputed activations, the teacher's choices, and what is refused."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.config.distill import DistillConfig
from d2o_dist.train.compress import compress_prompt
from d2o_dist.train.model import enable_activation_checkpointing
from d2o_dist.train.objective import Objective
from d2o_dist.train.passes import PromptPass
from tests.models import tiny_model, tokens
from tests.spec import spec
from tests.train.helpers import cut, exchange, parts, tiny_objective

D2O = spec(keep_ratio=0.3, min_layer_tokens=8)


def step(objective: Objective, d2o=D2O, kind="d2o_distill"):
    context, continuation = parts(2, 36, 48)
    losses = objective(kind, context=context, continuation=continuation, d2o=d2o)
    losses.total.backward()
    return losses


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("preset", ["d2o", "paper_minmax"])
def test_recomputed_activations_give_the_same_gradients(family, preset):
    d2o = spec(preset, keep_ratio=0.3, min_layer_tokens=8)
    weights = DistillConfig(context_lm_weight=0.5)
    plain, saving = (tiny_objective(family, distill=weights) for _ in range(2))
    enable_activation_checkpointing(saving.model)
    assert float(step(plain, d2o).total) == float(step(saving, d2o).total)
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)


def test_the_lm_objective_is_the_models_own_loss():
    ids = tokens(2, 40)
    objective = tiny_objective()
    expected = tiny_model()(ids, labels=ids).loss
    found = objective("lm", row=cut(ids, 0, 40)).total / (2 * 39)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_d2o_lm_is_the_loss_of_the_continuation_alone():
    losses = step(tiny_objective(distill=DistillConfig(kl_weight=3.0)), kind="d2o_lm")
    assert set(losses.sums) == {"lm"} and float(losses.total) == float(losses.sums["lm"])


def test_weights_add_the_losses_up():
    losses = step(tiny_objective(distill=DistillConfig(2.0, 0.5, 0.25)))
    sums = losses.sums
    assert float(losses.total) == pytest.approx(
        2 * float(sums["kl"]) + 0.5 * float(sums["lm"]) + 0.25 * float(sums["context_lm"])
    )


@pytest.mark.parametrize("preset", ["d2o", "h2o", "snapkv"])
def test_a_ratio_that_keeps_everything_is_measured_beside_others_in_any_order(preset):
    parts_, objective = parts(2, 36, 48), tiny_objective()
    d2o = [spec(preset, keep_ratio=ratio, min_layer_tokens=8, eviction_interval=None)
           for ratio in (1.0, 0.3)]  # fmt: skip
    first, second = objective.measure(*parts_, configs=d2o)
    assert float(first["kl"]) == pytest.approx(0, abs=1e-9) and float(second["kl"]) > 1e-3
    assert objective.measure(*parts_, configs=d2o[::-1]) == [second, first]


@pytest.mark.parametrize("queries", ["all", "strided"])
@pytest.mark.parametrize("preset", ["d2o", "paper_minmax", "released"])
def test_autocast_does_not_reach_what_is_decided(preset, queries):
    d2o = spec(preset, keep_ratio=0.2, min_layer_tokens=8, score_queries=queries, protected_layers=())
    generator = torch.Generator().manual_seed(0)
    layers = [[torch.randn(1, heads, 150, 32, generator=generator).bfloat16() for heads in (4, 2, 2)] for _ in range(3)]

    def compressed():
        step = PromptPass(exchange(), d2o)
        for index, (q, k, v) in enumerate(layers):
            step.attend(index, q * 3, k, v, 32**-0.5, None)
        return step.layers, compress_prompt(step.layers, d2o)

    seen, expected = compressed()
    with torch.autocast("cpu", torch.bfloat16):
        seen_there, found = compressed()
    assert found.slots == expected.slots
    for index in range(3):
        assert torch.equal(seen_there[index].scores, seen[index].scores)
        for name in ("keys", "values", "log_mass"):
            one, two = getattr(found.pasts[index], name), getattr(expected.pasts[index], name)
            assert (one is None and two is None) or torch.equal(one, two), name


def test_a_base_teacher_ignores_lora():
    peft = pytest.importorskip("peft")
    results = {}
    for teacher in ("current", "base"):
        from d2o_dist.train.attention import register

        register()
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)
        model = peft.get_peft_model(tiny_model(attention="d2o_train"), lora).double().train()
        objective = Objective(model, exchange(), DistillConfig(teacher=teacher), 16)
        results[teacher] = step(objective, spec("full"))
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained and all("lora_" in name for name in trained)
    assert float(results["current"].total) == pytest.approx(0, abs=1e-9)
    assert float(results["base"].total) > 1e-3


def test_a_model_in_training_attention_needs_its_pass():
    objective = tiny_objective()
    ids = tokens(1, 8)
    with pytest.raises(ValueError, match="needs d2o_pass"):
        objective.model(ids)
    with pytest.raises(ValueError, match="attention dropout"):
        tiny_objective(attention_dropout=0.1)("lm", row=cut(ids, 0, 8))
    with pytest.raises(ValueError, match="attention_mask must be None"):
        objective.model(ids, attention_mask=torch.ones_like(ids), d2o_pass=object())
