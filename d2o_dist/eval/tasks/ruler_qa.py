"""RULER's question answering: paragraphs that answer a question, hidden among paragraphs of other questions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from d2o_dist.eval.tasks.json_lines import json_lines
from d2o_dist.eval.tasks.ruler_parts import Draft, Material
from d2o_dist.fields.checks import check_string, check_strings
from d2o_dist.fields.io import read_json


@dataclass(frozen=True)
class Question:
    """A question, the answers that count, and the paragraphs that answer it."""

    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[str, ...]


def read_questions(path: str) -> list[Question]:
    """The rows of a JSONL file.

    Raises:
        ValueError: it is missing or empty, or a row lacks a field or has none of a kind that is needed.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"question file {file} does not exist")
    questions = []
    for number, line in json_lines(file):
        try:
            row = read_json(line)
            check_string("question", row.get("question"))
            answers, paragraphs = (check_strings(name, row.get(name)) for name in ("answers", "context"))
            if not answers or not paragraphs:
                raise ValueError("answers and context must not be empty")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} line {number}: {error}") from error
        questions.append(Question(row["question"], answers, paragraphs))
    if not questions:
        raise ValueError(f"question file {file} has no rows")
    return questions


def draft(material: Material, rng: random.Random) -> Draft:
    """A piece is one more paragraph that does not belong to the question."""
    chosen = material.questions[material.sample % len(material.questions)]
    others = sorted({text for other in material.questions for text in other.paragraphs} - set(chosen.paragraphs))
    rng.shuffle(others)
    seed = rng.getrandbits(64)

    def make(count: int) -> tuple[str, str, list[str]]:
        paragraphs = [*chosen.paragraphs, *others[:count]]
        random.Random(seed).shuffle(paragraphs)
        body = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(paragraphs, start=1))
        question = f"\nAnswer from the documents above, with the answer alone.\nQuestion: {chosen.question}"
        return body, question, list(chosen.answers)

    return Draft(instruction="Read the documents below.\n", make=make, most=len(others), prefix=" Answer:")
