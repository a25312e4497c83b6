"""Gradients of the compressed objective: finite differences, and what is a constant of the step."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.config.distill import DistillConfig
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.train import objective as objective_module
from d2o_dist.train.compress import compress_prompt
from d2o_dist.train.passes import PromptLayer
from tests.spec import spec
from tests.train.helpers import parts, tiny_objective

CONFIGS = {
    "keys_values": spec("paper_minmax", keep_ratio=0.3, min_layer_tokens=8),
    "values": spec("paper_minmax", keep_ratio=0.3, min_layer_tokens=8, merge="values"),
    "none": spec("h2o", keep_ratio=0.3, min_layer_tokens=8),
    "mass": spec("mass", keep_ratio=0.3, min_layer_tokens=8, tail_fraction=0.4),
    "mass_kept": spec("mass", keep_ratio=0.3, min_layer_tokens=8, merge_targets="kept"),
    "released": spec("released", keep_ratio=0.3, min_layer_tokens=8, protected_layers=(0,)),
}


def random_layers(batch=2, heads=2, group=2, length=40, dim=8, layers=3) -> dict[int, PromptLayer]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    return {
        index: PromptLayer(
            (draw(batch, heads, length, dim) - 0.3).requires_grad_(),
            (draw(batch, heads, length, dim) - 0.5).requires_grad_(),
            None,
            draw(batch, heads, length) * 4,
            draw(batch, heads, length) / 30 + 1e-3,
            draw(batch, heads * group) * (1 + index),
        )
        for index in range(layers)
    }


class Replay:
    """Records the outcomes of `nearest_kept` in one run and gives them back, in order, in the next."""

    def __init__(self):
        self.outcomes, self.next = [], None

    def __call__(self, evicted, kept, is_target):
        if self.next is None:
            self.outcomes.append(nearest_kept(evicted, kept, is_target))
            return self.outcomes[-1]
        self.next += 1
        return self.outcomes[self.next - 1]

    def rewind(self):
        self.next = 0


@pytest.mark.parametrize("name", CONFIGS)
def test_kept_and_merged_keys_and_values_against_finite_differences(name):
    layers = random_layers()
    replay = Replay()
    compress_prompt(layers, CONFIGS[name], nearest=replay)
    indices = list(layers)
    leaves = [tensor for layer in layers.values() for tensor in (layer.keys, layer.values)]
    merged = []

    def function(*tensors):
        replay.rewind()
        changed = {
            index: PromptLayer(tensors[2 * n], tensors[2 * n + 1], None, layer.scores, layer.rates, layer.variances)
            for n, (index, layer) in enumerate(layers.items())
        }
        pasts = compress_prompt(changed, CONFIGS[name], nearest=replay).pasts
        merged.append([pasts[index].log_mass for index in indices])
        # Squared, so that a gradient depends on where it is taken.
        return tuple(tensor.square() for index in indices for tensor in (pasts[index].keys, pasts[index].values))

    torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)
    if name.startswith("mass"):
        assert all(not mass.requires_grad and bool((mass > 0).any()) for mass in merged[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_evicted_tokens_get_gradients_only_through_merges(name):
    layers = random_layers()
    past = compress_prompt(layers, CONFIGS[name]).pasts[1]
    past.values.sum().backward()
    reached = layers[1].values.grad.abs().sum(-1)[0] > 0
    held = past.values.shape[2] if past.live is None else int(past.live[0].sum())
    assert bool((reached.sum(-1) > held).any()) == (name != "none")
    assert layers[1].keys.grad is None or not layers[1].keys.grad.any()


def losses_with(objective, monkeypatch, constants, replay, distill, d2o):
    """The objective with the statistics of the prompt recorded (first call) or replayed."""
    context, continuation = parts(2, 36, 48)

    def compress(layers, config, **kwargs):
        if not constants:
            constants.update(layers)
        fixed = {
            index: PromptLayer(layer.keys, layer.values, layer.window, old.scores, old.rates, old.variances)
            for (index, layer), old in zip(layers.items(), constants.values(), strict=True)
        }
        return compress_prompt(fixed, config, **kwargs)

    monkeypatch.setattr(objective_module, "compress_prompt", compress)
    return objective("d2o_distill" if distill else "d2o_lm", context=context, continuation=continuation, d2o=d2o,
                     nearest=replay).total  # fmt: skip


def normalise_in_float64(model: torch.nn.Module) -> None:
    """The models' RMS norms round to float32, which finite differences would see."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight = module.weight + 1 if "Gemma" in type(module).__name__ else module.weight
            module.weight = torch.nn.Parameter(weight.detach())
            module.forward = lambda x, m=module: torch.nn.functional.rms_norm(x, m.weight.shape, m.weight, 1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("name", ["keys_values", "mass", "none"])
def test_whole_objective_against_finite_differences(monkeypatch, name, family):
    """Along random directions of all parameters, with the constants of the step held."""
    weights = DistillConfig(kl_weight=0.0, lm_weight=1.0, context_lm_weight=0.5)
    objective = tiny_objective(family, distill=weights)
    normalise_in_float64(objective)
    constants, replay = {}, Replay()
    losses_with(objective, monkeypatch, constants, replay, True, CONFIGS[name]).backward()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
        expected = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True))
        values, eps = [], 1e-7
        for sign in (1, -2):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * eps)
                replay.rewind()
                values.append(float(losses_with(objective, monkeypatch, constants, replay, True, CONFIGS[name])))
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=eps)
        measured = (values[0] - values[1]) / (2 * eps)
        assert measured == pytest.approx(expected, rel=2e-5)


def test_distillation_from_the_full_cache_is_zero_when_nothing_is_evicted():
    objective = tiny_objective()
    context, continuation = parts(2, 36, 48)
    losses = objective(
        "d2o_distill", context=context, continuation=continuation, d2o=spec("full")
    )
    assert losses.achieved_keep_ratio == 1.0
    assert float(losses.total) == pytest.approx(0, abs=1e-9)
    squeezed = objective("d2o_distill", context=context, continuation=continuation, d2o=CONFIGS["keys_values"])
    assert float(squeezed.total) > 0.1 and squeezed.achieved_keep_ratio < 0.4
