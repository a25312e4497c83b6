"""Choices depend on the row, not on the batch."""

from __future__ import annotations

import pytest
import torch
import transformers

from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.sampling import LOST, Sampler, row_seed, warp

CPU = torch.device("cpu")
CONFIGS = {
    "greedy": SamplingConfig(),
    "plain": SamplingConfig(temperature=1.0),
    "all": SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=5),
    "penalty": SamplingConfig(repetition_penalty=2.0),
}
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [12, 13]]


def logits(step: int) -> torch.Tensor:
    return torch.randn(4, 40, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * 3


def alone(config: SamplingConfig, row: int, steps: int = 8) -> list[int]:
    sampler = Sampler(config, [row], [PROMPTS[row]], CPU)
    return [sampler.pick(logits(step)[row : row + 1])[0] for step in range(steps)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_alone_is_the_row_in_a_batch_whose_others_leave(name):
    config = CONFIGS[name]
    sampler, rows, found = Sampler(config, range(4), PROMPTS, CPU), [0, 1, 2, 3], {row: [] for row in range(4)}
    for step in range(8):
        for row, token in zip(rows, sampler.pick(logits(step)[rows]), strict=True):
            found[row].append(token)
        if step == 3:
            sampler.keep_rows([2, 0])
            rows = [2, 0]
    assert found[0] == alone(config, 0) and found[2] == alone(config, 2)
    assert found[1] == alone(config, 1, 4) and found[3] == alone(config, 3, 4)


def test_greedy_is_the_argmax():
    assert Sampler(SamplingConfig(), range(4), PROMPTS, CPU).pick(logits(0)) == logits(0).argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_those_of_multinomial(dtype):
    config = SamplingConfig(temperature=0.8, top_k=9, seed=3)
    sampler = Sampler(config, range(4), PROMPTS, CPU)
    generators = [torch.Generator().manual_seed(row_seed(3, index)) for index in range(4)]
    for step in range(30):
        scores = logits(step).to(dtype)
        probs = warp(config, scores).softmax(-1)
        want = [torch.multinomial(row, 1, generator=each).item() for row, each in zip(probs, generators, strict=True)]
        assert sampler.pick(scores) == want


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_row_that_cannot_be_chosen_from_is_lost_and_the_others_are_not(monkeypatch, config, bad, dtype):
    """On the host: an assertion on a GPU would make every later row of the process fail."""
    monkeypatch.setattr(torch, "multinomial", lambda *args, **kwargs: pytest.fail("asserts on the device"))
    sound, sampler = (Sampler(config, range(4), PROMPTS, CPU) for _ in range(2))
    for step in range(4):
        scores = logits(step).to(dtype)
        want = sound.pick(scores)
        # One NaN or inf is enough; of -inf all must be: some are tokens that a model rules out.
        scores[2, slice(None) if bad == -torch.inf else 5] = bad
        assert sampler.pick(scores) == [*want[:2], LOST, want[3]]


def test_tokens_that_are_ruled_out_are_not_chosen():
    for config in CONFIGS.values():
        scores = logits(0)
        best = scores.argmax(-1)
        scores[torch.arange(4), best] = -torch.inf
        found = Sampler(config, range(4), PROMPTS, CPU).pick(scores)
        assert LOST not in found and all(token != was for token, was in zip(found, best.tolist(), strict=True))


def test_rows_and_seeds_differ():
    seeds = {row_seed(seed, index) for seed in (0, 1, 2**32, 2**40) for index in range(50)}
    assert len(seeds) == 200 and max(seeds) < 2**32
    same = torch.zeros(1, 1000)

    def draw(seed: int, index: int) -> list[int]:
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed), [index], [[1]], CPU)
        return [sampler.pick(same)[0] for _ in range(3)]

    assert draw(0, 0) == draw(0, 0)
    assert len({tuple(draw(seed, index)) for seed in (0, 2**32) for index in range(5)}) == 10


def test_the_penalty_counts_prompt_and_answer():
    sampler = Sampler(SamplingConfig(repetition_penalty=4.0), [0, 1], [[0, 1], [2]], CPU)
    scores = torch.tensor([[9.0, 8.0, 4.0, 3.0]] * 2)
    assert sampler.pick(scores) == [2, 0]
    assert sampler.pick(scores) == [3, 1]


def test_only_what_is_asked_for_is_done():
    for config in (SamplingConfig(), SamplingConfig(top_k=5, top_p=0.5), SamplingConfig(temperature=1.0)):
        assert torch.equal(warp(config, logits(0)), logits(0))


@pytest.mark.parametrize("fields", [
    {"temperature": 0.7}, {"temperature": 1.5, "top_k": 3}, {"temperature": 1.0, "top_k": 99},
    {"repetition_penalty": 1.7}, {"temperature": 1.0, "top_p": 0.4},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
], ids=str)  # fmt: skip
def test_logits_are_changed_as_generate_of_transformers_does(fields):
    config, seen = SamplingConfig(**fields), torch.tensor(PROMPTS[2] + PROMPTS[2])[None].repeat(4, 1)
    theirs = transformers.LogitsProcessorList()
    theirs.append(transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if not config.is_greedy:
        theirs.append(transformers.TemperatureLogitsWarper(config.temperature))
        theirs += [transformers.TopKLogitsWarper(config.top_k)] if config.top_k else []
        theirs += [transformers.TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
    for step in range(5):
        for dtype in (torch.float32, torch.float64):
            scores = logits(step).to(dtype)
            assert torch.equal(warp(config, scores, seen), theirs(seen, scores))
