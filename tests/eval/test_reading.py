"""Hidden questions and continuations, against sessions that are driven by hand and against plain forwards."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.comm import ParallelMesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.loop import generate
from d2o_dist.engine.session import Session, left_pad
from d2o_dist.eval.continuation import compare, continuation_logits
from d2o_dist.eval.reading import Reading, SeparateReading
from d2o_dist.models.hf import D2OCache
from tests.engine.tiny import Numbers, request
from tests.models import tiny_model, tokens
from tests.spec import spec

FULL = spec("full")
MASS = spec("mass", keep_ratio=0.4, min_layer_tokens=8)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [tokens(1, length, seed + place)[0].tolist() for place, length in enumerate(lengths)]


@torch.inference_mode()
def plain_logits(model, ids) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("question_lengths", [(7, 7), (3, 9), (1, 4), (1, 1)])
@torch.inference_mode()
def test_with_the_full_cache_a_hidden_question_is_a_visible_one(model, question_lengths):
    contexts, questions = rows(50, 31), rows(*question_lengths, seed=9)
    session = Reading(model, contexts, [FULL], pad_id=0).start(FULL, questions)
    logits = session.prefill(torch.zeros(0), torch.zeros(0))
    for row in range(2):
        expected = plain_logits(model, contexts[row] + questions[row])[-1]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-9)
    assert [usage.full_bytes // usage.held_bytes for usage in session.compressed] == [1, 1]


@torch.inference_mode()
def test_a_hidden_question_is_read_after_the_compression(model):
    (context,), (question,) = rows(60), rows(8, seed=5)
    session = Reading(model, [context], [MASS], pad_id=0).start(MASS, [question])
    logits = session.prefill(torch.zeros(0), torch.zeros(0))
    cache = D2OCache(config=model.config, d2o=MASS)
    model(input_ids=torch.tensor([context]), past_key_values=cache)
    cache.finalize()
    positions = torch.arange(60, 68)[None]
    expected = model(input_ids=torch.tensor([question]), past_key_values=cache, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    assert session.compressed[0].achieved_keep_ratio == pytest.approx(0.4, abs=0.01)
    whole = plain_logits(model, context + question)[-1]
    assert (logits[0] - whole).abs().max() > 1e-3


def test_generate_takes_a_reading(model):
    prompts = rows(40, 22)
    for config in (FULL, MASS):
        session = Reading(model, prompts, [FULL, MASS], pad_id=0, chunk=16).start(config)
        requests = [request(place, ids, 12) for place, ids in enumerate(prompts)]
        results = generate(session, requests, SamplingConfig(), Numbers())
        for ids, result in zip(prompts, results, strict=True):
            cache = D2OCache(config=model.config, d2o=config)
            expected = model.generate(torch.tensor([ids]), past_key_values=cache, max_new_tokens=12, do_sample=False)
            assert result.tokens == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("how", ["chunk", "decode"])
@torch.inference_mode()
def test_the_full_cache_predicts_what_a_plain_forward_does(model, how):
    prompts, texts = rows(30, 41), rows(9, 9, seed=4)
    logits = continuation_logits(Reading(model, prompts, [FULL], pad_id=0).start(FULL), texts, how)
    for row in range(2):
        expected = plain_logits(model, prompts[row] + texts[row])[len(prompts[row]) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-9)


@torch.inference_mode()
def test_decode_evicts_while_chunk_does_not(model):
    prompts, texts = rows(60), rows(40, seed=4)
    reading = Reading(model, prompts, [MASS], pad_id=0)
    sessions = {how: reading.start(MASS) for how in ("chunk", "decode")}
    logits = {how: continuation_logits(session, texts, how) for how, session in sessions.items()}
    # Until the first eviction, which is due after 16 steps, both hold the same slots.
    torch.testing.assert_close(logits["chunk"][:, :16], logits["decode"][:, :16], rtol=0, atol=1e-9)
    assert (logits["chunk"][:, 17:] - logits["decode"][:, 17:]).abs().max() > 1e-6
    assert sessions["decode"].row_usage(0).held_bytes < sessions["chunk"].row_usage(0).held_bytes


@pytest.mark.parametrize("how", ["layerwise", "stream"])
@torch.inference_mode()
def test_another_reading_is_that_of_a_session(model, how):
    """A method that reads for itself, beside one that starts from what all share."""
    config = spec("d2o", keep_ratio=0.4, min_layer_tokens=4)
    if how == "stream":
        config = spec("lean", keep_tokens=20, min_layer_tokens=4)
    prompts, texts = rows(60, 41), rows(9, 9, seed=4)
    reading = Reading(model, prompts, [config], pad_id=0, chunk=16)
    found = reading.start(config, reading=how)
    logits = continuation_logits(found, texts, "chunk")
    session = Session(model, config, reading=how)
    expected = [session.prefill(*left_pad(prompts, 0), 16)]
    expected += [session.decode([text[place] for text in texts]) for place in range(8)]
    decoded = continuation_logits(reading.start(config, reading=how), texts, "decode")
    torch.testing.assert_close(decoded, torch.stack(expected, 1), rtol=0, atol=0)
    assert found.compressed[0].achieved_keep_ratio == pytest.approx(0.4 if how == "layerwise" else 20 / 60, abs=0.02)
    whole = continuation_logits(reading.start(config), texts, "chunk")
    assert (logits - whole).abs().max() > 1e-6  # values are merged in several steps, and chunks of a stream see less
    alone = SeparateReading(
        model, prompts, pad_id=0, chunk=16, mesh=ParallelMesh.local(), parallel=ParallelConfig()
    ).start(config, reading=how)  # fmt: skip
    torch.testing.assert_close(continuation_logits(alone, texts, "chunk"), logits, rtol=0, atol=0)


def test_compare_against_loops():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(2, 70, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    texts = torch.randint(0, 11, (2, 70), generator=generator).tolist()
    for row, found in enumerate(compare(mine, theirs, texts)):
        nll = kl = top1 = 0.0
        for place in range(70):
            p, q = mine[row, place].softmax(0), theirs[row, place].softmax(0)
            nll -= float(p[texts[row][place]].log())
            kl += float(sum(q[i] * (q[i] / p[i]).log() for i in range(11)))
            top1 += float(p.argmax() == q.argmax())
        assert found == pytest.approx({"nll": nll / 70, "kl": kl / 70, "top1": top1 / 70})
    same = compare(mine, mine, texts)[0]
    assert same["kl"] == 0 and same["top1"] == 1


def test_all_logits_of_chunks_are_refused(model):
    with pytest.raises(ValueError, match="not in chunks of 8"):
        Reading(model, rows(20), [FULL], pad_id=0, chunk=8, all_logits=True)
