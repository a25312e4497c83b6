"""LongBench from its own data: a local folder of JSONL files, or the archive on the hub."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2o_dist.config.eval_tasks import LongBenchTask
from d2o_dist.eval.examples import Example, Task, Tools
from d2o_dist.eval.metrics.longbench import best, cut_chinese, qa_f1_zh, rouge_l_zh
from d2o_dist.eval.tasks.json_lines import json_lines
from d2o_dist.eval.tasks.longbench_published import spec_of, wording
from d2o_dist.fields.checks import check_strings
from d2o_dist.fields.io import read_json

HUB = "hub:"
ARCHIVE = "data.zip"
CHINESE = (qa_f1_zh, rouge_l_zh)


class LongBench(Task):
    """One of the tasks; see `LongBenchTask`. `score`: the task's own metric, in [0, 1]."""

    primary = "score"
    metrics = ("score",)

    def __init__(self, config: LongBenchTask, task: str) -> None:
        self.config, self.task, self.spec = config, task, spec_of(config, task)
        self.name = f"{config.name}/{task}"
        self.uses_template = self.spec.chat
        self.scoring: Mapping = {"kind": "longbench", "task": task, "version": 1}
        self.note = f"LongBench, {wording(config)}."

    def rows(self, tools: Tools) -> Sequence[Example]:
        """The first `samples` rows of the data, in its order."""
        source = f"{self.config.data} {self.task}"
        if self.spec.metric in CHINESE:
            try:
                cut_chinese("")
            except ImportError as error:
                raise ValueError(f"{self.name}: {error}") from error
        rows = []
        for number, line in enumerate(lines(self.config.data, self.task), start=1):
            if self.config.samples is not None and len(rows) >= self.config.samples:
                break
            try:
                rows.append(self._example(read_json(line), number))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{source} row {number}: {type(error).__name__}: {error}") from error
        if not rows:
            raise ValueError(f"{source} has no rows")
        return rows

    def _example(self, row: Mapping[str, Any], number: int) -> Example:
        answers = check_strings("answers", row["answers"])
        return Example(
            id=str(row.get("_id", number)),
            # Not `format`: code has braces of its own.
            context=self.spec.before.replace("{input}", row["input"]) + row["context"],
            question=self.spec.after.replace("{input}", row["input"]),
            answers=answers,
            max_new_tokens=self.spec.max_new_tokens,
            extra={"classes": tuple(row.get("all_classes") or ())},
        )

    def score(self, example: Example, text: str) -> dict[str, float]:
        """The published metric, of the first line where that is what is scored."""
        if self.spec.first_line:
            text = text.lstrip("\n").split("\n")[0]
        return {"score": best(self.spec.metric, text, example.answers, example.extra["classes"])}


def lines(data: str, task: str) -> Iterator[str]:
    """The JSON lines of one task.

    Raises:
        ValueError: there is no file of that name, or the hub cannot be reached.
    """
    if data.startswith(HUB):
        yield from _hub_lines(data.removeprefix(HUB), task)
        return
    folder = Path(data).expanduser()
    for path in (folder / f"{task}.jsonl", folder / f"{task}.jsonl.gz"):
        if path.is_file():
            yield from (line for _, line in json_lines(path))
            return
    raise ValueError(f"{folder} has no {task}.jsonl (or .jsonl.gz)")


def _hub_lines(name: str, task: str) -> Iterator[str]:
    from huggingface_hub import hf_hub_download

    try:
        archive = hf_hub_download(name, ARCHIVE, repo_type="dataset")
    except Exception as error:  # the hub raises whatever the network gives
        raise ValueError(f"{ARCHIVE} of {name} cannot be had from the hub: {str(error).splitlines()[0]}") from error
    with zipfile.ZipFile(archive) as opened:
        member = next((each for each in opened.namelist() if each.endswith(f"/{task}.jsonl")), None)
        if member is None:
            raise ValueError(f"{ARCHIVE} of {name} has no {task}.jsonl")
        with opened.open(member) as file:
            yield from (line.decode("utf-8") for line in file if line.strip())
