"""What tasks are made of: examples that are answered with text, and passages whose next tokens are predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """A prompt in parts and the answers that count as right.

    Attributes:
        id: unique in its task.
        context: the long part; what `truncation` cuts, and all that is compressed when the question is hidden.
        question: what follows it: instruction and question.
        answers: accepted answers, or all that must be found; what they mean is the task's.
        max_new_tokens, stop: where generation ends.
        prefix: text that begins the answer and is part of the prompt.
        groups: what results are grouped by, such as length and depth.
        extra: whatever else scoring needs.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    prefix: str = ""
    stop: tuple[str, ...] = ()
    groups: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Passage:
    """Tokens of a real text: the first `num_prompt` are read and compressed, the others predicted."""

    id: str
    tokens: tuple[int, ...]
    num_prompt: int
    continuation: str
    groups: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tools:
    """What tasks are built with.

    Attributes:
        tokenizer: of the model.
        load_text: name or path -> text.
        count: example, whether a template may be used -> tokens of its prompt.
        seed: of everything drawn at random.
        max_positions: tokens the model has positions for, or None.
    """

    tokenizer: Any
    load_text: Callable[[str], str]
    count: Callable[[Example, bool], int]
    seed: int
    max_positions: int | None = None


class Task(ABC):
    """One line of the results.

    Attributes:
        name: in tables and records; primary: the metric of the table; metrics: all of them.
        uses_template: whether prompts may go through the chat template.
        axes: groups that span a heat map: `(x, y)`, or None.
        scoring: plain values that say how a result comes of a row: together with the row all that it depends on, so
            nothing about how many rows there are. Results of another scoring are not reused.
        higher_is_better: of the primary metric.
        note: what a reader of the results must know, or None.
    """

    name: str
    primary: str
    metrics: tuple[str, ...]
    uses_template: bool = True
    axes: tuple[str, str] | None = None
    higher_is_better: bool = True
    note: str | None = None
    scoring: Mapping[str, Any]

    @abstractmethod
    def rows(self, tools: Tools) -> Sequence[Example] | Sequence[Passage]:
        """All rows, the same for the same tools and configuration.

        Raises:
            ValueError: a text that is missing or too short, data that does not fit.
        """

    def score(self, example: Example, text: str) -> dict[str, float]:
        """Every metric of one generated answer, in [0, 1] unless said otherwise."""
        raise NotImplementedError(f"{self.name} has no generated answers")
