"""A file of the user's own: prompts made of the fields of each JSON row, and the answers that count."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2o_dist.config.eval_tasks import JsonlTask
from d2o_dist.eval.examples import Example, Task, Tools
from d2o_dist.eval.metrics.answers import contains_all, contains_any, starts_with_answer
from d2o_dist.eval.metrics.longbench import qa_f1, rouge_l
from d2o_dist.eval.metrics.rouge import rouge_1
from d2o_dist.eval.tasks.json_lines import json_lines
from d2o_dist.fields.checks import check_strings
from d2o_dist.fields.io import read_json
from d2o_dist.fields.show import clip, shown

_FIELD = re.compile(r"\{(\w+)\}")


def _best(metric: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    return lambda text, answers: max(metric(text, answer) for answer in answers)


# Names as in `JsonlTask`.
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "contains_all": contains_all,
    "contains_any": contains_any,
    "starts_with": _best(starts_with_answer),
    "qa_f1": _best(qa_f1),
    "rouge_1": _best(rouge_1),
    "rouge_l": _best(rouge_l),
}


class Jsonl(Task):
    """See `JsonlTask`. `score`: its metric, in [0, 1]."""

    primary = "score"
    metrics = ("score",)

    def __init__(self, config: JsonlTask) -> None:
        self.config = config
        self.name = config.name
        self.uses_template = config.chat
        self.scoring: Mapping = {"kind": "jsonl", "metric": config.metric, "version": 1}

    def rows(self, tools: Tools) -> Sequence[Example]:
        """The first `samples` rows of the file, in its order."""
        path = Path(self.config.data).expanduser()
        if not path.is_file():
            raise ValueError(f"{self.name}: {path} does not exist")
        rows = []
        for number, line in json_lines(path):
            if self.config.samples is not None and len(rows) >= self.config.samples:
                break
            try:
                rows.append(self._example(read_json(line), number))
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from error
        if not rows:
            raise ValueError(f"{path} has no rows")
        return rows

    def _example(self, row: Any, number: int) -> Example:
        config = self.config
        if not isinstance(row, Mapping):
            raise ValueError(f"a row must be a JSON object, not a {type(row).__name__}")
        answers = field(row, config.answers)
        answers = [_text(answer) for answer in (answers if isinstance(answers, list) else [answers])]
        if not answers:
            raise ValueError(f"{config.answers} has no answer")
        context, question = fill(config.context, row), fill(config.question, row)
        if config.question_from is not None:
            mark = fill(config.question_from, row)
            at = context.rfind(mark)
            if at < 0:
                raise ValueError(f"question_from ({shown(mark)}) does not occur in the context")
            context, question = context[:at], context[at:] + question
        return Example(
            id=str(number),
            context=context,
            question=question,
            answers=check_strings(config.answers, answers),
            max_new_tokens=config.max_new_tokens,
            prefix=fill(config.prefix, row),
            stop=config.stop,
        )

    def score(self, example: Example, text: str) -> dict[str, float]:
        """The metric of the configuration."""
        return {"score": METRICS[self.config.metric](text, example.answers)}


def field(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field.

    Raises:
        ValueError: the row has none of that name.
    """
    if name not in row:
        raise ValueError(f'there is no field "{name}"; there are {clip(", ".join(row)) or "none"}')
    return row[name]


def fill(template: str, row: Mapping[str, Any]) -> str:
    """`{name}` replaced by the fields of a row; what stands in a field is not replaced again.

    Raises:
        ValueError: the row lacks a field.
    """
    return _FIELD.sub(lambda found: _text(field(row, found.group(1))), template)


def _text(value: Any) -> str:
    """Strings as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
