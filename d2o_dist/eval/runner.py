"""Runs a plan: each batch of prompts is read once, then every method compresses it and answers."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from d2o_dist.comm import ParallelMesh
from d2o_dist.config.evaluate import FULL, Method
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.batching import make_batches
from d2o_dist.engine.encode import Request
from d2o_dist.engine.loop import generate
from d2o_dist.engine.runner import BatchError
from d2o_dist.engine.session import RowUsage
from d2o_dist.eval.continuation import compare, continuation_logits, lost_rows
from d2o_dist.eval.plan import EvalPlan, Job
from d2o_dist.eval.reading import Reading, SeparateReading
from d2o_dist.eval.store import Record
from d2o_dist.evict.budgets import NotFiniteError
from d2o_dist.models import loading
from d2o_dist.models.cache import settle_reading

Todo = tuple[Job, tuple[Method, ...]]


def pending(jobs: Iterable[Job], methods: Sequence[Method], finished: Iterable[str]) -> list[Todo]:
    """The jobs with the methods that have no result yet; jobs that have all are left out."""
    done = set(finished)
    todo = [(job, tuple(method for method in methods if job.key(method) not in done)) for job in jobs]
    return [(job, missing) for job, missing in todo if missing]


def batches(
    todo: Sequence[Todo], batch_size: int, max_batch_tokens: int, border: int | None
) -> list[list[Todo]]:
    """Groups of rows of one task that lack the same methods, of similar length, in the order of the tasks."""
    alike: dict[tuple, list[Todo]] = {}
    for job, methods in todo:
        alike.setdefault((job.task.name, tuple(method.label for method in methods)), []).append((job, methods))
    return [
        [group[place] for place in places]
        for group in alike.values()
        for places in make_batches([job.num_prompt_tokens for job, _ in group], batch_size, max_batch_tokens, border)
    ]


class EvalRunner:
    """Runs batches of a plan on one model.

    Args:
        model: loaded; mesh: all ranks; those that share a request call a runner together.
        log: called with lines about rows that failed.

    Raises:
        ValueError: a method whose reading the model does not allow.
    """

    def __init__(
        self, plan: EvalPlan, model: Any, mesh: ParallelMesh, *, log: Callable[[str], None] = lambda line: None
    ) -> None:
        self.plan, self.model, self.mesh = plan, loading.adapt(model), mesh
        self._eos_ids = loading.eos_ids(self.model, plan.tokenizer)
        self._pad_id = loading.pad_id(plan.tokenizer)
        self._log = log
        for method in plan.methods:
            settle_reading(method.reading, self.model.tile_refusal, method.d2o)

    def run_batch(self, batch: Sequence[Todo]) -> Iterable[list[Record]]:
        """Records, method after method. If a batch fails, its rows are tried one by one; a row that fails alone gets
        a record with an error for each method that is missing then.

        Where several ranks share a request only `NotFiniteError` is tried again: the ranks share the variances of
        attention, so that all of them raise it at the same step. After any other error they may stand at different
        steps, and would wait for each other. That error ends the job; what was written stays.

        Raises:
            BatchError: only where several ranks share a request.
        """
        jobs, methods = [job for job, _ in batch], batch[0][1]
        done: set[str] = set()
        try:
            run = self._passages if jobs[0].encoded is None else self._examples
            for method, records in run(jobs, methods):
                done.add(method.label)
                yield records
            return
        except Exception as error:  # whatever a row meets, the others go on
            message = str(error) if isinstance(error, NotFiniteError) else f"{type(error).__name__}: {error}"
            if self._shared and not isinstance(error, NotFiniteError):
                # Of another type: a ValueError would be said by rank 0 alone, and this may be another.
                rows = ", ".join(job.row.id for job in jobs)
                raise BatchError(f"rows {rows} of {jobs[0].task.name} failed: {message}") from error
        # Out of the except block, so that the traceback lets go of the failed batch's tensors before the next try.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        missing = tuple(method for method in methods if method.label not in done)
        if len(jobs) > 1:
            self._log(
                f"a batch of {len(jobs)} rows of {jobs[0].task.name} failed ({message}); its rows are tried alone"
            )
            for job in jobs:
                yield from self.run_batch([(job, missing)])
            return
        # One method may fail where others can run: a budget that a short prompt cannot have.
        if len(missing) > 1:
            for method in missing:
                yield from self.run_batch([(jobs[0], (method,))])
            return
        yield [self._failed(jobs[0], missing[0], message)]

    @property
    def _shared(self) -> bool:
        return self.mesh.axis("request").size > 1

    def _read(self, prompts: list[Sequence[int]], methods: Sequence[Method]) -> Reading | SeparateReading:
        whole = [method.d2o for method in methods if method.reading == "whole"]
        if self._shared or not whole:
            return SeparateReading(
                self.model, prompts, pad_id=self._pad_id, chunk=self.plan.config.prefill_chunk, mesh=self.mesh,
                parallel=self.plan.config.parallel,
            )  # fmt: skip
        return Reading(
            self.model, prompts, whole, pad_id=self._pad_id, chunk=self.plan.config.prefill_chunk,
        )  # fmt: skip

    def _examples(self, jobs: list[Job], methods: Sequence[Method]) -> Iterable[tuple[Method, list[Record]]]:
        hidden = self.plan.config.question == "hidden"
        reading = self._read([job.encoded.context if hidden else job.encoded.ids for job in jobs], methods)
        questions = [job.encoded.question for job in jobs] if hidden else None
        requests = [
            Request(job.index, job.row.id, job.encoded.ids, job.row.max_new_tokens, job.row.stop) for job in jobs
        ]
        for method in methods:
            session = reading.start(method.d2o, questions, method.reading)
            results = generate(
                session, requests, SamplingConfig(), self.plan.tokenizer, eos_ids=self._eos_ids, pad_id=self._pad_id
            )
            yield method, [
                self._failed(job, method, result.error) if result.error is not None else self._scored(
                    job, method, usage, text=result.text, num_new_tokens=len(result.tokens),
                    finish_reason=result.finish_reason, end_held_bytes=result.usage.held_bytes,
                    scores=job.task.score(job.row, result.text), rank_bytes=session.rank_bytes // len(jobs),
                )
                for job, result, usage in zip(jobs, results, session.compressed, strict=True)
            ]  # fmt: skip

    def _passages(self, jobs: list[Job], methods: Sequence[Method]) -> Iterable[tuple[Method, list[Record]]]:
        full = next(method for method in self.plan.methods if method.name == FULL)
        reading = self._read([job.row.tokens[: job.row.num_prompt] for job in jobs], [full, *methods])
        texts = [job.row.tokens[job.row.num_prompt :] for job in jobs]
        how = jobs[0].row.continuation
        session = reading.start(full.d2o)
        reference = continuation_logits(session, texts, how)
        lost_reference = lost_rows(reference, session.cache.ranks, "the full cache's")
        for method in methods:
            session = reading.start(method.d2o, reading=method.reading)
            logits = continuation_logits(session, texts, how)
            lost = lost_rows(logits, session.cache.ranks)
            scores = compare(logits, reference, texts)
            rank_bytes = session.rank_bytes // len(jobs)
            yield method, [
                self._failed(job, method, mine or theirs) if mine or theirs else
                self._scored(job, method, usage, num_new_tokens=len(text), scores=row, rank_bytes=rank_bytes)
                for job, text, row, usage, mine, theirs in zip(
                    jobs, texts, scores, session.compressed, lost, lost_reference, strict=True
                )
            ]  # fmt: skip

    def _scored(self, job: Job, method: Method, usage: RowUsage, scores: dict[str, float], **known: Any) -> Record:
        """The record of a result; of an error where a score is no number to take a mean of."""
        for name, value in scores.items():
            if not math.isfinite(value):
                return self._failed(job, method, f"its {name} is {value}")
        return self._record(job, method, usage, scores=scores, **known)

    def _failed(self, job: Job, method: Method, error: str) -> Record:
        self._log(f"{job.task.name} row {job.row.id}, {method.label}: {error}")
        return self._record(job, method, error=error)

    def _record(self, job: Job, method: Method, usage: RowUsage | None = None, **known: Any) -> Record:
        example = job.encoded is not None
        return {
            "task": job.task.name,
            "row": job.row.id,
            "method": method.name,
            "budget": method.budget,
            "groups": dict(job.row.groups),
            "num_prompt_tokens": job.num_prompt_tokens,
            "num_cut_tokens": job.encoded.num_cut if example else 0,
            "num_new_tokens": known.get("num_new_tokens"),
            "text": known.get("text"),
            "answers": list(job.row.answers) if example else None,
            "finish_reason": known.get("finish_reason"),
            "scores": known.get("scores"),
            "achieved_keep_ratio": None if usage is None else usage.achieved_keep_ratio,
            "held_bytes": None if usage is None else usage.held_bytes,
            "full_bytes": None if usage is None else usage.full_bytes,
            "end_held_bytes": known.get("end_held_bytes"),
            "rank": self.mesh.rank,
            "rank_bytes": known.get("rank_bytes"),
            "key": job.key(method),
            "error": known.get("error"),
        }
