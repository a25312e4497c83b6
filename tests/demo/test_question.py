"""The demo's questions. Tokens are words."""

from __future__ import annotations

import pytest

from launch.demo.question import FACTS_AND_DEPTHS, Fact, Question, build_question, build_questions

FACT = Fact("The captain's cat is", "Marmalade", "Who is the captain's cat?")
TEXT = " ".join(f"Sentence {i} has a few plain words\nand an end." for i in range(400))


class Words:
    def encode(self, string: str) -> list[str]:
        return string.split()


@pytest.mark.parametrize("num_tokens", [60, 500, 2000])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_prompt_fills_its_length_and_holds_the_fact_once_at_its_depth(num_tokens, depth):
    question = build_question(Words(), TEXT, FACT, num_tokens, depth)
    assert question.num_tokens == len(question.prompt.split())
    assert num_tokens - 10 < question.num_tokens <= num_tokens
    assert question.prompt.count("The captain's cat is Marmalade.") == 1
    assert question.prompt.endswith("\n\nQuestion: Who is the captain's cat?\nAnswer: The captain's cat is")
    before = question.prompt.split("The captain's cat is Marmalade.")[0]
    assert question.depth == len(before.split()) / question.num_tokens
    assert abs(question.depth - depth) < 0.02 + 20 / num_tokens
    assert before == "" or before.endswith("end. ")


def test_start_gives_another_haystack():
    first, second = (build_question(Words(), TEXT, FACT, 200, 0.5, start) for start in (0, 7))
    assert first.prompt.startswith("Sentence 0 ") and second.prompt.startswith("Sentence 7 ")


def test_the_three_questions_differ_and_answer_each_other_in_no_place():
    questions = build_questions(Words(), TEXT, 600)
    assert len({q.answer for q in questions}) == len(questions) == len(FACTS_AND_DEPTHS) == 3
    for mine in questions:
        assert [q.answer for q in questions if q.answer in mine.prompt] == [mine.answer]


def test_errors_name_both_numbers():
    with pytest.raises(ValueError, match=r"num_tokens \(10\) must be more than the 16 "):
        build_question(Words(), TEXT, FACT, 10)
    with pytest.raises(ValueError, match=r"ends \d+ tokens before num_tokens \(100000\)"):
        build_question(Words(), TEXT, FACT, 100_000)
    with pytest.raises(ValueError, match=r"depth \(1.5\) must be between 0 and 1"):
        build_question(Words(), TEXT, FACT, 500, 1.5)


@pytest.mark.parametrize(
    ("generated", "right", "prefix"),
    [
        (" 48213.\n", True, 1.0),
        ("48213", True, 1.0),
        (" 482135", False, 1.0),
        (" 48299", False, 0.6),
        (" in 48213", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_scoring(generated, right, prefix):
    question = Question("...", "48213", "?", 1, 0.1)
    assert question.is_answered_by(generated) is right
    assert question.correct_prefix(generated) == prefix
