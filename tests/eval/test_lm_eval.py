"""The model class of lm-evaluation-harness: its numbers against plain forwards, and a task through the harness."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

from tests.engine.tiny import make_folder
from tests.ranks import run_ranks
from tests.spec import spec

pytest.importorskip("lm_eval")

from d2o_dist.engine.session import Session  # noqa: E402
from d2o_dist.eval.lm_eval import D2OLM, _device, _sampling, register, segments  # noqa: E402

WORDS = "the quick brown fox jumps over the lazy dog and a cache keeps what it needs".split()
CONTEXT = " ".join(WORDS[i % len(WORDS)] for i in range(0, 300, 7))
SMALL = {"budget.min_layer_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=512))


def make(folder: str, **values) -> D2OLM:
    return D2OLM(folder, device="cpu", **values)


def requests(*args) -> list:
    return [SimpleNamespace(args=each) for each in args]


@torch.inference_mode()
def log_probs(model, ids) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def test_full_loglikelihood_is_that_of_a_forward(folder):
    lm = make(folder, preset="full")
    pairs = [(CONTEXT, " lazy dog"), (CONTEXT, " fox"), ("the", " quick brown"), ("", "a cache")]
    for (context, continuation), (total, greedy) in zip(pairs, lm.loglikelihood(requests(*pairs), True), strict=True):
        ids = lm.tok_encode(context) if context else [lm.prefix_token_id]
        follows = lm.tok_encode(continuation)
        rows = log_probs(lm.model.model, ids + follows)[len(ids) - 1 : -1]
        assert total == pytest.approx(sum(float(row[token]) for row, token in zip(rows, follows, strict=True)))
        assert greedy == (rows.argmax(-1).tolist() == follows)


def test_compressed_loglikelihood_is_that_of_a_session(folder):
    lm = make(folder, preset="lean", keep_ratio=0.2, **SMALL)
    ((total, _),) = lm.loglikelihood(requests((CONTEXT, " fox")), True)
    ids, (token, *rest) = lm.tok_encode(CONTEXT), lm.tok_encode(" fox")
    session = Session(lm.model, spec("lean", keep_ratio=0.2, min_layer_tokens=8))
    with torch.inference_mode():
        session.prefill(torch.tensor([ids[:-1]]), torch.ones(1, len(ids) - 1))
        expected = 0.0
        for seen, target in zip([ids[-1], token, *rest], [token, *rest], strict=False):
            expected += float(session.decode([seen])[0].log_softmax(-1)[target])
    assert total == pytest.approx(expected)


def test_rolling_loglikelihood(folder):
    text = " ".join(WORDS * 6)
    lm = make(folder, preset="full", rolling_segment=30)
    ids = lm.tok_encode(text, add_special_tokens=False)
    rows = log_probs(lm.model.model, [lm.prefix_token_id, *ids[:-1]])
    expected = sum(float(row[token]) for row, token in zip(rows, ids, strict=True))
    assert lm.loglikelihood_rolling(requests((text,)), True)[0] == pytest.approx(expected)
    less = make(folder, preset="h2o", keep_ratio=0.2, rolling_segment=30, **SMALL)
    assert abs(less.loglikelihood_rolling(requests((text,)), True)[0] - expected) > 0.1


@pytest.mark.parametrize(("length", "size"), [(1, 4), (4, 4), (5, 4), (6, 4), (9, 4), (10, 2), (0, 3)])
def test_segments(length, size):
    parts = list(segments(length, size))
    assert [place for start, end in parts for place in range(start, end)] == list(range(length))
    assert all(end - start > 1 for start, end in parts) or length == 1


def test_generation_is_that_of_generate(folder):
    lm = make(folder, preset="full", batch_size=2)
    arguments = {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}
    texts = lm.generate_until(requests((CONTEXT, arguments), ("the fox", arguments), ("a", {"until": []})), True)
    for context, text in zip((CONTEXT, "the fox"), texts, strict=False):
        ids = torch.tensor([lm.tok_encode(context)])
        new = lm.model.model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
        assert text == lm.tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]
    assert len(lm.tok_encode(texts[2])) <= 256 and lm.apply_chat_template([{"role": "user", "content": "hi"}])


def test_a_text_without_context_is_generated_too(folder):
    lm = make(folder, keep_ratio=0.2)
    arguments = {"max_gen_toks": 4}
    begins = lm.tokenizer.decode(lm.prefix_token_id)
    empty, begin = (lm.generate_until(requests((text, arguments)), True) for text in ("", begins))
    assert lm.tok_encode(begins) == [lm.prefix_token_id] and empty == begin


def test_refusals(folder):
    with pytest.raises(ValueError, match=r"batch_size \(auto\)"):
        make(folder, batch_size="auto")
    with pytest.raises(ValueError, match=r"rolling_segment \(1\) must be at least 2"):
        make(folder, rolling_segment=1)
    with pytest.raises(ValueError, match=r"max_length \(-5\) must be at least 2"):
        make(folder, max_length=-5)
    with pytest.raises(ValueError, match='no preset "masss"'):
        make(folder, preset="masss")
    with pytest.raises(ValueError, match='no field "kep_ratio".*Did you mean "keep_ratio"'):
        make(folder, kep_ratio=0.1)
    with pytest.raises(ValueError, match=r"max_gen_toks \(600\) must be below max_length \(512\)"):
        make(folder).generate_until(requests(("a", {"max_gen_toks": 600})), True)


TASK = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory, folder):
    """Choices whose right answer is what the full cache finds likeliest."""
    path = tmp_path_factory.mktemp("task")
    lm = make(folder, preset="full")
    rows = []
    choices = ["fox", "lazy", "keeps", "cache", "dog", "what"]
    for number in range(16):
        context = " ".join(random.Random(number).choices(WORDS, k=70))
        scores = [
            score for score, _ in lm.loglikelihood(requests(*((context, f" {choice}") for choice in choices)), True)
        ]
        rows.append({"context": context, "choices": choices, "label": scores.index(max(scores))})
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "choices.yaml").write_text(TASK.replace("DATA", str(path / "data.jsonl")))
    return str(path)


def accuracy(task: str, folder: str, **values) -> float | None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    register()
    found = simple_evaluate(
        model="d2o_dist", model_args={"pretrained": folder, **values}, tasks=["choices"], device="cpu",
        task_manager=TaskManager(include_path=task, include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    return None if found is None else found["results"]["choices"]["acc,none"]


def test_the_harness_sees_the_ratio(task, folder):
    assert accuracy(task, folder, preset="full") == 1.0
    ratios = [accuracy(task, folder, preset="streaming", keep_ratio=ratio, **SMALL) for ratio in (0.9, 0.1)]
    assert ratios[1] < ratios[0] <= 1


def rank_accuracy(rank: int, world: int, task: str, folder: str) -> float | None:
    return accuracy(task, folder, preset="streaming", keep_ratio=0.1, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "temperature"),
    [
        ({}, 0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 0.0, "do_sample": True}, 0),
        ({"do_sample": True}, 1),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
        ({"do_sample": False, "temperature": 1.0, "top_p": 0.9}, 0),
    ],
)
def test_sampling_is_what_the_harness_means(arguments, temperature):
    assert _sampling(arguments).temperature == temperature


@pytest.mark.parametrize(
    ("name", "ranks", "device"), [(None, 2, "auto"), ("cuda:0", 1, "cuda:0"), ("cuda:0", 2, "cuda"), ("cpu", 2, "cpu")]
)
def test_ranks_have_a_gpu_each_where_the_harness_means_the_first(name, ranks, device):
    assert _device(name, ranks) == device


@pytest.mark.multirank
def test_ranks_share_the_documents(task, folder):
    alone = accuracy(task, folder, preset="streaming", keep_ratio=0.1, **SMALL)
    assert run_ranks(2, rank_accuracy, task, folder) == [alone, None]
