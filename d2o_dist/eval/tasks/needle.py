"""Needle in a haystack: one made-up fact in a long real text, over a grid of lengths and depths."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d2o_dist.config.eval_tasks import NeedleTask
from d2o_dist.eval.examples import Example, Task, Tools
from d2o_dist.eval.fill import largest_fit
from d2o_dist.eval.metrics.answers import correct_characters, correct_prefix, starts_with_answer
from d2o_dist.eval.metrics.rouge import rouge_1
from d2o_dist.eval.text import sentences

PLACES = (
    "north greenhouse", "old lighthouse", "harbour office", "clock tower", "stone bridge", "river mill",
    "glass pavilion", "east observatory", "botanical library", "silver warehouse", "mountain chapel", "tram depot",
    "marble theatre", "salt archive", "copper foundry", "winter stables",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A sentence and what is asked about it; `start` is the sentence up to its answer, where it has that form."""

    sentence: str
    question: str
    answer: str
    start: str = ""


def code_fact(place: str, digits: int, rng: random.Random) -> Fact:
    """A number that only this sentence tells."""
    start = f"The secret access code of the {place} is"
    answer = str(rng.randrange(10 ** (digits - 1), 10**digits))
    return Fact(f"{start} {answer}.", f"What is the secret access code of the {place}?", answer, start)


class Needle(Task):
    """See `NeedleTask`. Metrics: `exact` (the answer begins the text), `prefix` (share of its characters before the
    first wrong one), `characters` (share of them in their place) and `rouge1`."""

    metrics = ("exact", "prefix", "characters", "rouge1")
    axes = ("length", "depth")

    def __init__(self, config: NeedleTask) -> None:
        self.config = config
        self.name = config.name
        self.primary = "exact" if config.fact is None else "rouge1"
        self.scoring: Mapping = {"kind": "needle", "fixed": config.fact is not None, "version": 1}

    def rows(self, tools: Tools) -> Sequence[Example]:
        """One example for each length, depth and sample."""
        pieces = sentences(tools.load_text(self.config.haystack))
        grid = [(n, d, s) for n in self.config.lengths for d in self.config.depths for s in range(self.config.samples)]
        return [self._example(pieces, length, depth, sample, tools) for length, depth, sample in grid]

    def _example(self, pieces: list[str], length: int, depth: float, sample: int, tools: Tools) -> Example:
        config = self.config
        row_id = f"{length}-{depth:g}-{sample}"
        # Not of the length: the same facts and the same beginning of the text at every length.
        rng = random.Random(f"{tools.seed}:{config.name}:{depth:g}:{sample}")
        if config.fact is not None:
            facts = [Fact(config.fact, config.question, config.answer)]
        else:
            if config.needles > len(PLACES):
                raise ValueError(f"needles ({config.needles}) must be at most {len(PLACES)}")
            facts = [code_fact(place, config.digits, rng) for place in rng.sample(PLACES, config.needles)]
        depths = [depth] + [rng.random() for _ in facts[1:]]
        start = rng.randrange(len(pieces))
        rotated = pieces[start:] + pieces[:start]

        def make(count: int) -> Example:
            return Example(
                id=row_id,
                context=hide(rotated[:count], facts, depths),
                question=f"\n\nQuestion: {facts[0].question}\nAnswer:",
                answers=(facts[0].answer,),
                max_new_tokens=config.max_new_tokens,
                prefix=f" {facts[0].start}" if facts[0].start else "",
                stop=("\n",),
                groups={"length": length, "depth": depth},
            )

        count = largest_fit(
            lambda n: tools.count(make(n), self.uses_template), length, most=len(pieces), what=f"{self.name} {row_id}"
        )
        return make(count)

    def score(self, example: Example, text: str) -> dict[str, float]:
        """All four, of the text after the prompt."""
        (answer,) = example.answers
        return {
            "exact": starts_with_answer(text, answer) if self.config.fact is None else float(answer in text),
            "prefix": correct_prefix(text, answer),
            "characters": correct_characters(text, answer),
            "rouge1": rouge_1(text, answer),
        }


def hide(pieces: Sequence[str], facts: Sequence[Fact], depths: Sequence[float]) -> str:
    """The pieces as one text, each fact at the piece boundary nearest to its depth, measured in characters."""
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece) + 1)
    placed: dict[int, list[str]] = {}
    for fact, depth in zip(facts, depths, strict=True):
        cut = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
        placed.setdefault(cut, []).append(fact.sentence)
    parts = []
    for number in range(len(ends)):
        parts += placed.get(number, [])
        parts += pieces[number : number + 1]
    return " ".join(parts)
