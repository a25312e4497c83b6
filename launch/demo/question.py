"""Questions over a long text: one made-up fact early in real prose, and at the end a question that only it answers.

The prompt ends inside the answer ("... Answer: The name of the cat is"), so that a small model has one thing to do:
copy what it read. Greedy decoding then starts with a space and the answer.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from dataclasses import dataclass

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Fact:
    sentence_start: str  # the fact up to its answer; the prompt ends with it too
    answer: str
    question: str

    @property
    def sentence(self) -> str:
        return f"{self.sentence_start} {self.answer}."


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str
    question: str  # the question alone, to show
    num_tokens: int  # length of the prompt under the tokenizer it was built with
    depth: float  # where the fact begins, as a fraction of the prompt's tokens

    def is_answered_by(self, generated: str) -> bool:
        """True where the generated text starts with the answer as a whole word."""
        rest = generated.strip().removeprefix(self.answer)
        return rest != generated.strip() and not rest[:1].isalnum()

    def correct_prefix(self, generated: str) -> float:
        """Fraction of the answer's characters that are right before the first wrong one: finer than right or wrong."""
        return len(os.path.commonprefix([generated.strip(), self.answer])) / len(self.answer)


FACTS_AND_DEPTHS: tuple[tuple[Fact, float], ...] = (
    (
        Fact(
            "The secret access code of the north greenhouse is",
            "48213",
            "What is the secret access code of the north greenhouse?",
        ),
        0.10,
    ),
    (
        Fact(
            "The annual lighthouse keepers' conference is held in the city of",
            "Lisbon",
            "In which city is the annual lighthouse keepers' conference held?",
        ),
        0.20,
    ),
    (
        Fact(
            "The name of the captain's orange cat is",
            "Marmalade",
            "What is the name of the captain's orange cat?",
        ),
        0.40,
    ),
)


def build_questions(tokenizer, text: str, num_tokens: int, start: int = 0) -> list[Question]:
    """The three questions of FACTS_AND_DEPTHS over the same text, each of at most `num_tokens` tokens."""
    return [build_question(tokenizer, text, fact, num_tokens, depth, start) for fact, depth in FACTS_AND_DEPTHS]


def build_question(tokenizer, text: str, fact: Fact, num_tokens: int, depth: float = 0.1, start: int = 0) -> Question:
    """A prompt of whole sentences of `text`, as long as fits in `num_tokens`, with `fact` at about `depth`.

    tokenizer: anything with `encode(str) -> list`. start: how many sentences of `text` to skip, for other haystacks.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth ({depth}) must be between 0 and 1")
    tail = f"\n\nQuestion: {fact.question}\nAnswer: {fact.sentence_start}"
    room = num_tokens - len(tokenizer.encode(f" {fact.sentence}{tail}"))
    if room <= 0:
        raise ValueError(f"num_tokens ({num_tokens}) must be more than the {num_tokens - room} of fact and question")

    sentences: list[str] = []
    for sentence in _sentences(text, start):
        room -= len(tokenizer.encode(f" {sentence}"))
        if room < 0:
            break
        sentences.append(sentence)
    else:
        raise ValueError(f"the text ends {room} tokens before num_tokens ({num_tokens}): give a longer text")

    while True:  # sentences tokenized apart may be a token or two off: shorten until the whole prompt fits
        before, after = sentences[: (cut := _cut(sentences, depth))], sentences[cut:]
        prompt = " ".join([*before, fact.sentence, *after]) + tail
        length = len(tokenizer.encode(prompt))
        if length <= num_tokens or not sentences:
            break
        sentences.pop()
    found_at = len(tokenizer.encode(" ".join(before))) / length if before else 0.0
    return Question(prompt, fact.answer, fact.question, length, found_at)


def _sentences(text: str, start: int) -> Iterator[str]:
    """The sentences of `text` after the first `start`, with every run of white space made one space."""
    for number, sentence in enumerate(SENTENCE_END.split(text)):
        if number >= start and sentence.strip():
            yield " ".join(sentence.split())


def _cut(sentences: list[str], depth: float) -> int:
    """How many sentences lie before the place at `depth` of their characters, to the nearest sentence end."""
    ends, total = [0], 0
    for sentence in sentences:
        total += len(sentence) + 1
        ends.append(total)
    return min(range(len(ends)), key=lambda i: abs(ends[i] - depth * total))
