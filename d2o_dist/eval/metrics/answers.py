"""Metrics of short answers: right or wrong, and how nearly right."""

from __future__ import annotations

import os.path
from collections.abc import Sequence


def starts_with_answer(text: str, answer: str) -> float:
    """1 where the text begins with the answer as a whole word (white space aside), else 0."""
    text = text.strip()
    return float(text.startswith(answer) and not text[len(answer) :][:1].isalnum())


def correct_prefix(text: str, answer: str) -> float:
    """Share of the answer's characters that are right before the first wrong one."""
    return len(os.path.commonprefix([text.strip(), answer])) / len(answer)


def correct_characters(text: str, answer: str) -> float:
    """Share of the answer's characters that stand in their place."""
    return sum(a == b for a, b in zip(text.strip(), answer, strict=False)) / len(answer)


def contains_all(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the text, letter case aside (RULER's metric of lists)."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def contains_any(text: str, answers: Sequence[str]) -> float:
    """1 where one of the answers occurs in the text, letter case aside (RULER's metric of questions)."""
    return float(any(answer.lower() in text.lower() for answer in answers))
