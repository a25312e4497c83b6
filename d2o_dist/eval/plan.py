"""What an evaluation will do, found and checked before any weights are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from d2o_dist.comm import ParallelMesh
from d2o_dist.comm.agreement import agreed
from d2o_dist.config.evaluate import EvalConfig, Method
from d2o_dist.eval.encode import Encoded, Encoder
from d2o_dist.eval.examples import Example, Passage, Task, Tools
from d2o_dist.eval.tasks.registry import make_tasks
from d2o_dist.eval.text import text_loader
from d2o_dist.models import loading
from d2o_dist.models.cache import ModelCache
from d2o_dist.models.device import pick_device
from d2o_dist.models.digest import model_digests, one_digest


@dataclass(frozen=True)
class Job:
    """One row of one task.

    Attributes:
        index: place among all rows of the evaluation; encoded: None for a passage.
        digest: of everything that its results depend on, the method aside; not of what other rows the task has.
    """

    index: int
    task: Task
    row: Example | Passage
    encoded: Encoded | None
    digest: str

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that are read before anything is generated or predicted."""
        return self.row.num_prompt if self.encoded is None else len(self.encoded.ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated or predicted at most."""
        return len(self.row.tokens) - self.row.num_prompt if self.encoded is None else self.row.max_new_tokens

    def key(self, method: Method) -> str:
        """Of one result: the same if and only if row, settings and method are the same."""
        how = [] if method.reading == Method.reading else [method.reading]
        return one_digest([self.digest, method.d2o.to_dict(), *how])


@dataclass(frozen=True)
class EvalPlan:
    """Everything but the weights.

    Attributes:
        weights: digest of the model's files, which results are known by.
        border: rows of up to so many tokens are not read with longer ones; None: all may be.
    """

    config: EvalConfig
    tokenizer: Any
    tasks: list[Task]
    jobs: list[Job]
    methods: list[Method]
    weights: str
    border: int | None = None


def prepare(
    config: EvalConfig, named_texts: Mapping[str, Callable[[], str]], mesh: ParallelMesh | None = None
) -> EvalPlan:
    """Read and check everything that needs no weights. Every rank of the mesh calls it together, and gets the same.

    Args:
        named_texts: texts that tasks may name instead of a path.

    Raises:
        ValueError: data that is missing or too short, a model that cannot be compressed or divided among the ranks, a
            budget its layers cannot have, a row that does not fit the model; on whichever rank.
    """
    mesh = ParallelMesh.local() if mesh is None else mesh
    with agreed(mesh) as same:
        plan = _prepare(config, named_texts)
        same.add("the model", plan.weights)
        same.add("the rows or the tokenizer", [job.digest for job in plan.jobs])
        same.add("the methods", [method.label for method in plan.methods])
    return plan


def _prepare(config: EvalConfig, named_texts: Mapping[str, Callable[[], str]]) -> EvalPlan:
    infer, methods = config.infer(), config.expand_methods()
    pick_device(config.device)
    shape = loading.describe(infer)
    parallel = config.parallel.resolve(shape.kv_heads_of_rank(config.parallel.tp))
    shape.check_sequence_ranks(parallel.sp)
    for index, method in enumerate(methods):
        # An empty cache costs nothing, and refuses what it cannot serve. Results are known by the shares of a profile.
        try:
            parallel.check_rules(method.d2o)
            methods[index] = dataclasses.replace(method, d2o=ModelCache(shape, method.d2o).d2o)
        except ValueError as error:
            raise ValueError(f"method {method.label}: {error}") from error
    tokenizer = loading.load_tokenizer(infer)
    encoder = Encoder(
        tokenizer, chat_template=config.chat_template, system_prompt=config.system_prompt,
        max_positions=shape.max_positions, max_prompt_tokens=config.max_prompt_tokens,
        max_prompt_bytes=config.max_prompt_bytes, truncation=config.truncation,
    )  # fmt: skip
    tools = Tools(tokenizer, text_loader(named_texts), encoder.count, config.seed, shape.max_positions)
    tasks = make_tasks(config.tasks)
    weights = one_digest(model_digests(config.model, config.revision))
    settings = {name: getattr(config, name) for name in ("model", "tokenizer", "dtype", "revision", "question")}
    settings["weights"] = weights
    jobs: list[Job] = []
    for task in tasks:
        ids: set[str] = set()
        for row in task.rows(tools):
            if row.id in ids:
                raise ValueError(f"task {task.name}: two rows have the id {row.id}; results are told apart by it")
            ids.add(row.id)
            jobs.append(_make_job(len(jobs), task, row, encoder, settings))
    return EvalPlan(config, tokenizer, tasks, jobs, methods, weights, shape.border)


def _make_job(index: int, task: Task, row: Example | Passage, encoder: Encoder, settings: dict[str, Any]) -> Job:
    about: list[Any] = [settings, task.name, row.id, dict(row.groups), dict(task.scoring)]
    if isinstance(row, Passage):
        return Job(index, task, row, None, one_digest([*about, row.tokens, row.num_prompt, row.continuation]))
    try:
        encoded = encoder.encode(row, task.uses_template)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from error
    about += [encoded.context, encoded.question, row.max_new_tokens, row.stop, row.answers, dict(row.extra)]
    return Job(index, task, row, encoded, one_digest(about))
