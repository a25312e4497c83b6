"""RULER's thirteen tasks (Hsieh et al., arXiv 2404.06654), generated here. The wording of the prompts is our own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from d2o_dist.config.eval_tasks import RulerTask
from d2o_dist.eval.examples import Example, Task, Tools
from d2o_dist.eval.fill import largest_fit
from d2o_dist.eval.metrics.answers import contains_all, contains_any
from d2o_dist.eval.tasks import ruler_counting, ruler_niah, ruler_qa, ruler_tracking
from d2o_dist.eval.tasks.ruler_parts import Draft, Material
from d2o_dist.eval.text import sentences

# Task -> (what drafts a row, tokens generated). A draft is everything random about a row, fixed before its length is.
DRAFTS: dict[str, tuple[Callable[[Material, random.Random], Draft], int]] = {
    **{name: (ruler_niah.drafter(kind), 128) for name, kind in ruler_niah.KINDS.items()},
    "vt": (ruler_tracking.draft, 30),
    "cwe": (ruler_counting.draft_common_words, 120),
    "fwe": (ruler_counting.draft_frequent_words, 50),
    "qa_1": (ruler_qa.draft, 32),
    "qa_2": (ruler_qa.draft, 32),
}


class Ruler(Task):
    """One of the tasks; see `RulerTask`. `score`: share of the answers found, or for `qa` whether one was."""

    primary = "score"
    metrics = ("score",)

    def __init__(self, config: RulerTask, task: str) -> None:
        self.config, self.task = config, task
        self.name = f"{config.name}/{task}"
        self.scoring: Mapping = {"kind": "ruler", "task": task, "version": 1}

    def rows(self, tools: Tools) -> Sequence[Example]:
        """`samples` examples of each length."""
        config = self.config
        questions: list[ruler_qa.Question] = []
        if self.task.startswith("qa"):
            own = config.qa_1_file if self.task == "qa_1" else config.qa_2_file
            questions = ruler_qa.read_questions(own)
        needs_text = self.task in ruler_niah.KINDS and ruler_niah.KINDS[self.task].haystack == "text"
        text = sentences(tools.load_text(config.haystack)) if needs_text else []
        rows = []
        for length in config.lengths:
            for sample in range(config.samples):
                material = Material(text, questions, length, sample)
                rng = random.Random(f"{tools.seed}:{self.task}:{length}:{sample}")
                rows.append(self._example(material, rng, tools))
        return rows

    def _example(self, material: Material, rng: random.Random, tools: Tools) -> Example:
        drafter, published = DRAFTS[self.task]
        max_new_tokens = min(published, self.config.max_new_tokens or published)
        draft = drafter(material, rng)
        row_id = f"{material.length}-{material.sample}"

        def make(count: int) -> Example:
            body, question, answers = draft.make(count)
            return Example(
                id=row_id, context=f"{draft.instruction}\n{body}", question=f"\n{question}", answers=tuple(answers),
                max_new_tokens=max_new_tokens, prefix=draft.prefix, groups={"length": material.length},
            )  # fmt: skip

        def tokens(count: int) -> int:
            return tools.count(make(count), self.uses_template)

        what, limit = f"{self.name} {row_id}", material.length - max_new_tokens
        count = largest_fit(tokens, limit, most=draft.most, what=what)
        # `largest_fit` may stop a few tokens early.
        if count < draft.least and (least := tokens(draft.least)) > limit:
            raise ValueError(f"{what}: the least that the task makes sense with has {least} tokens, above {limit}")
        return make(max(count, draft.least))

    def score(self, example: Example, text: str) -> dict[str, float]:
        """RULER's own metrics."""
        metric = contains_any if self.task.startswith("qa") else contains_all
        return {"score": metric(text, example.answers)}
