"""The demo itself: the same questions over a long text, with the full cache and with compressed ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from d2o_dist.cache.report import CacheReport
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.encode import Request
from d2o_dist.engine.loop import generate
from d2o_dist.engine.session import Session
from d2o_dist.policy.config import D2OConfig
from launch.demo.question import Question


@dataclass(frozen=True)
class Answer:
    """One question answered with one cache."""

    method: str
    question: Question
    text: str
    time_to_first_token_s: float
    tokens_per_s: float | None
    report: CacheReport

    @property
    def is_right(self) -> bool:
        """Whether the text starts with the answer."""
        return self.question.is_answered_by(self.text)


def answer_all(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    methods: dict[str, D2OConfig],
    max_new_tokens: int,
    mesh: ParallelMesh,
    parallel: ParallelConfig,
) -> Iterator[Answer]:
    """Every question with every method, one after the other, greedily; on all ranks of the mesh together."""
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, ignore_eos=True)
    for question in questions:
        ids = tuple(tokenizer(question.prompt)["input_ids"])
        for name, config in methods.items():
            session = Session(model, config, mesh, parallel)
            request = Request(index=0, id=name, input_ids=ids, max_new_tokens=max_new_tokens)
            result = generate(session, [request], sampling, tokenizer)[0]
            if result.error is not None:
                raise FloatingPointError(result.error)
            yield Answer(
                name, question, result.text, result.time_to_first_token_s, result.tokens_per_s, session.cache.report()
            )


def table(answers: Sequence[Answer]) -> str:
    """One line a method: right answers, bytes, speed."""
    lines = [
        f"{'cache':<12} {'right':>6} {'kept':>7} {'KV cache':>11} {'first token':>12} {'decode':>12}",
    ]
    for name in dict.fromkeys(answer.method for answer in answers):
        own = [answer for answer in answers if answer.method == name]
        held = fmean(answer.report.held_bytes for answer in own) / 2**20
        kept = fmean(answer.report.achieved_keep_ratio for answer in own)
        speeds = [answer.tokens_per_s for answer in own if answer.tokens_per_s]
        lines.append(
            f"{name:<12} {sum(answer.is_right for answer in own):>3} / {len(own)} {kept:>7.3f} {held:>7.1f} MiB "
            f"{median(answer.time_to_first_token_s for answer in own):>10.2f} s "
            f"{(median(speeds) if speeds else 0):>6.1f} tok/s"
        )
    return "\n".join(lines)
