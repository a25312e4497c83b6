"""Metrics against the packages that define them, and against values worked out by hand."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from d2o_dist.eval.metrics import answers, longbench
from d2o_dist.eval.metrics.rouge import lcs_members, rouge_1

TEXTS = [
    "The cat sat on the mat. It was a black cat, and the mat was red.",
    "A black cat sat on a red mat",
    "the the the the",
    "Dogs chase cats. Cats chase mice. Mice chase nobody.",
    "Mice chase cats.  Nobody chases dogs",
    "12 apples, 3 pears & one banana...",
    "one banana 12 pears",
    "x",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("other", TEXTS)
def test_rouge_1_is_that_of_rouge_score(text, other):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"], use_stemmer=False)
    assert rouge_1(text, other) == pytest.approx(scorer.score(other, text)["rouge1"].fmeasure)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("other", TEXTS)
def test_rouge_l_is_that_of_rouge(text, other):
    scores = pytest.importorskip("rouge").Rouge().get_scores([text], [other], avg=True)
    assert longbench.rouge_l(text, other) == pytest.approx(scores["rouge-l"]["f"], abs=1e-6)


def test_rouge_l_of_random_texts_is_that_of_rouge():
    rouge = pytest.importorskip("rouge").Rouge()
    rng = random.Random(0)

    def text() -> str:
        parts = [" ".join(rng.choices("abcdefg", k=rng.randrange(1, 12))) for _ in range(rng.randrange(1, 5))]
        return ". ".join(parts)

    for _ in range(200):
        mine, theirs = text(), text()
        expected = rouge.get_scores([mine], [theirs], avg=True)["rouge-l"]["f"]
        assert longbench.rouge_l(mine, theirs) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [("", "abc"), ("abc", "abc"), ("abcbdab", "bdcaba"), ("xy", "ab"), ("aab", "aba")])
def test_longest_common_subsequence(a, b):
    """Its words are those of one of the longest among all subsequences."""
    every = [part for size in range(len(a) + 1) for part in combinations(a, size)]
    common = [part for part in every if part in set(combinations(b, len(part)))]
    longest = max(map(len, common))
    assert lcs_members(list(a), list(b)) in [set(part) for part in common if len(part) == longest]


def test_empty_texts_score_nothing():
    assert rouge_1("", "a") == rouge_1("a", "") == longbench.rouge_l("", "a b") == longbench.qa_f1("", "x") == 0


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("It is the Eiffel Tower", "Eiffel Tower", 2 * 0.5 * 1 / 1.5),
        ("nothing", "Eiffel Tower", 0.0),
        ("a b b", "b b c", 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
    ],
)
def test_question_answering_f1(text, answer, score):
    assert longbench.qa_f1(text, answer) == pytest.approx(score)


def test_chinese_f1_and_rouge():
    pytest.importorskip("jieba")
    assert longbench.qa_f1_zh("北京。", "北京") == 1.0
    assert 0 < longbench.qa_f1_zh("答案是北京", "北京") < 1
    assert longbench.rouge_l_zh("今天 天气 很好", "今天 天气 很好") == pytest.approx(1.0)
    assert longbench.rouge_l_zh("明月", "白云") == 0


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("Location", "Location", 1.0),
        ("Location or Date", "Location", 0.5),
        ("City location", "City location", 1.0),  # "City" is part of the right name and does not count
        ("Date", "Location", 0.0),
        ("", "Location", 0.0),
    ],
)
def test_classification(text, answer, score):
    assert longbench.classification(text, answer, ["Location", "Date", "City", "City location"]) == score


def test_numbers():
    assert longbench.retrieval("Paragraph 12 or 3", "Paragraph 12") == 0.5
    assert longbench.retrieval("none", "Paragraph 12") == 0
    assert longbench.retrieval_zh("段落7", "段落7") == 1
    assert longbench.count("5, 5, 6", "5") == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="names no paragraph"):
        longbench.retrieval("1", "first")


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("\n\nreturn x\nmore", "return x", 1.0),
        ("# a comment\n```\nreturn y", "return x", 0.88),  # 2 * 7 / 16 in whole percent
        ("```", "return x", 0.0),
        ("abc", "xyz", 0.0),
    ],
)
def test_code_similarity(text, answer, score):
    assert longbench.code_similarity(text, answer) == pytest.approx(score)


def test_best_answer_counts():
    assert longbench.best(longbench.qa_f1, "Paris", ["Rome", "Paris"], ()) == 1.0


def test_short_answers():
    assert answers.starts_with_answer(" 48213.", "48213") == 1 and answers.starts_with_answer("482134", "48213") == 0
    assert answers.correct_prefix(" 48013", "48213") == 0.4 and answers.correct_characters("48013", "48213") == 0.8
    assert answers.contains_all("Abc and def", ["abc", "DEF", "x", "y"]) == 0.5
    assert answers.contains_any("abc", ["x", "ABC"]) == 1 and answers.contains_any("abc", ["x"]) == 0
