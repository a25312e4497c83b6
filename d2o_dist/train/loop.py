"""A whole run: prepare, train, measure, save, export."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from d2o_dist.comm import Collectives, ParallelMesh
from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.queue import first_rank_first
from d2o_dist.config.train import TrainConfig
from d2o_dist.eval.plan import EvalPlan
from d2o_dist.models.hf.loading import load_config, load_tokenizer
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.models.rules import settle_rules
from d2o_dist.train.batches import Batch, StepOrder, make_batch
from d2o_dist.train.checkpoints import Checkpoints, RunState
from d2o_dist.train.documents import load_documents
from d2o_dist.train.engine import Engine, TorchEngine
from d2o_dist.train.export import export_model
from d2o_dist.train.log import RunLog, peak_memory_bytes
from d2o_dist.train.measure import headline, measure
from d2o_dist.train.model import check_trainable, load_trainable, make_objective
from d2o_dist.train.resume import check_data, digest_rows, go_on
from d2o_dist.train.rows import PackedRows, WindowRows
from d2o_dist.train.schedule import drawn_ratio, learning_rate, torch_seed
from d2o_dist.train.tasks import plan_tasks, run_tasks

Rows = PackedRows | WindowRows


class Diverged(FloatingPointError):
    """Something of the training is not finite. Raised by all ranks alike."""


@dataclass
class Run:
    """Everything a run needs, made by `prepare`."""

    config: TrainConfig
    mesh: ParallelMesh
    device: torch.device
    engine: Engine
    order: StepOrder
    train: Rows
    validation: Rows | None
    tasks: EvalPlan | None
    tokenizer: Any
    checkpoints: Checkpoints
    log: RunLog
    state: RunState
    world: Collectives = field(init=False)

    def __post_init__(self) -> None:
        self.world = Collectives(self.mesh.axis("world"))

    @property
    def output(self) -> Path:
        """Where everything is written."""
        return Path(self.config.output)


def prepare(
    config: TrainConfig,
    mesh: ParallelMesh,
    device: torch.device,
    named_texts: Mapping[str, Callable[[], str]] = MappingProxyType({}),
) -> Run:
    """Check, read the data, load the model, and go to where an earlier run stopped. Called by all ranks.

    Args:
        named_texts: texts that `eval_tasks` may name instead of a path.

    Raises:
        ValueError: anything in the configuration, the data or the model that does not fit, before weights are loaded
            where that is possible.
    """
    micro_steps = config.micro_steps(mesh.dp)
    model_config = load_config(config)
    check_trainable(model_config, config)
    shape = shape_of(model_config)
    config = dataclasses.replace(config, d2o=settle_rules(config.d2o, shape))
    tokenizer = load_tokenizer(config)
    world = Collectives(mesh.axis("world"))
    output = Path(config.output)
    log = RunLog(output if mesh.rank == 0 else None)
    checkpoints = Checkpoints(output / "checkpoints", world)
    found = None
    with agreed(mesh):
        if mesh.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            last, state, notes = go_on(checkpoints, config, mesh.world_size)
            found = None if last is None else str(last), asdict(state), notes
    found, state, notes = world.broadcast_object(found)
    last, state = None if found is None else Path(found), RunState(**state)
    train, validation = _read_rows(config, tokenizer, mesh)
    tasks = plan_tasks(config, named_texts)
    order = StepOrder(len(train), config.seed, config.global_batch_size, config.micro_batch_size, mesh.dp, mesh.dp_rank)
    with agreed(mesh) as told:
        digests = {"train": digest_rows(train), "validation": digest_rows(validation)}
        told.add("the data or the tokenizer", digests)
        state = check_data(last, state, digests)
    for note in notes:
        log.say(note)
    log.say(f"{len(train)} rows of {config.sequence_length} tokens; step {state.step} of {config.steps}; {mesh}")
    engine = make_engine(config, mesh, device, micro_steps, last)
    if last is not None:
        engine.load(last)
    log.go_on(None if last is None else state.step)
    return Run(config, mesh, device, engine, order, train, validation, tasks, tokenizer, checkpoints, log, state)


def make_engine(
    config: TrainConfig, mesh: ParallelMesh, device: torch.device, micro_steps: int, resume_from: Path | None
) -> Engine:
    """The engine of a run, with the model as it was before training."""
    torch.manual_seed(config.seed)  # LoRA begins at random
    objective = make_objective(load_trainable(config, device), config, mesh)
    world = Collectives(mesh.axis("world"))
    if config.engine.name == "torch":
        autocast = torch.bfloat16 if config.dtype == "bfloat16" else None
        return TorchEngine(objective, config.optimizer, world, autocast)
    from d2o_dist.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(objective, config, micro_steps, world, resume_from)


def train(run: Run) -> RunState:
    """Take the steps that are left; the state at the end. Called by all ranks.

    Raises:
        Diverged: a loss, the norm of the gradients, what is measured or a weight is not finite, on any rank;
            on all of them alike, before anything is saved or exported.
    """
    config = run.config
    if run.state.step == 0 and config.eval_every is not None:
        _measure(run, 0)
    while run.state.step < config.steps:
        step = run.state.step
        record = take_step(run, step)
        if step % config.log_every == 0 or step + 1 == config.steps:
            run.log.record("train", {"step": step + 1, **record})
        done, last = step + 1, step + 1 == config.steps
        measured = None
        if config.eval_every is not None and (done % config.eval_every == 0 or last):
            measured = _measure(run, done)
        is_best = measured is not None and (run.state.best is None or measured < run.state.best)
        run.state = RunState(done, measured if is_best else run.state.best, measured, run.state.facts)
        saves = last or is_best or (config.save_every is not None and done % config.save_every == 0)
        if saves:
            odd = _sum_over_ranks(run, {"odd": float(not run.engine.weights_are_finite())})["odd"]
            _end_unless(not odd, run, done, "a weight")
        if is_best:
            # Before the checkpoint: a run that ends in between takes this step once more, and exports it again.
            export_model(run.engine, run.tokenizer, run.output / "model-best", config.dtype, run.world)
        if saves:
            run.checkpoints.save(run.state, run.engine.save, is_best=is_best)
    export_model(run.engine, run.tokenizer, run.output / "model", config.dtype, run.world)
    return run.state


def take_step(run: Run, step: int) -> dict[str, Any]:
    """One optimizer step on all ranks, and what is to be said of it."""
    config, started = run.config, time.perf_counter()
    torch.manual_seed(torch_seed(step, config.seed, run.mesh.rank))
    batches = [_load(run, numbers) for numbers in run.order.rows(step)]
    counts = _sum_over_ranks(run, {"tokens": sum(batch.num_tokens for batch in batches), **_counts(batches)})
    extra: dict[str, Any] = {}
    ratio = None
    if config.objective != "lm":
        ratio = drawn_ratio(step, config.seed, *config.keep_ratio)
        extra["d2o"] = config.d2o_at(ratio)
    sums: dict[str, float] = {}
    achieved, attends = [], True
    for batch in batches:
        losses = run.engine.micro_step(config.objective, **batch.arguments, **extra, counts=counts)
        for name, value in (losses.sums | {"total": losses.total.detach()}).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        achieved.append(losses.achieved_keep_ratio)
        attends = attends and losses.attends
    odd, *values = _sum_over_ranks(run, {"odd": float(not attends), **sums}).values()
    _end_unless(not odd, run, step + 1, "the attention of a prompt")
    sums = dict(zip(sums, values, strict=True))
    _end_unless(_are_finite(sums), run, step + 1, "a loss", sums)
    lr = learning_rate(step, config.steps, config.optimizer)
    norm = run.engine.update(lr)
    # Every rank has it, but one may have it otherwise.
    _end_unless(_are_finite(_sum_over_ranks(run, {"norm": norm})), run, step + 1, "the norm of the gradients")
    seconds = time.perf_counter() - started
    parts = {"context_lm": "context", "lm": "row" if config.objective == "lm" else "continuation", "kl": "continuation"}
    means = {name: sums[name] / max(counts[parts[name]], 1) for name in parts if name in sums}
    return {
        "loss": sums["total"],
        **means,
        "keep_ratio": ratio,
        "achieved_keep_ratio": None if ratio is None else sum(achieved) / len(achieved),
        "grad_norm": norm,
        "lr": lr,
        "tokens_per_s": counts["tokens"] / seconds,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _load(run: Run, numbers: list[int]) -> Batch:
    rows = [run.train[number] for number in numbers]
    return make_batch(rows, run.config.context_length, run.mesh.sp_rank, run.mesh.sp, run.device)


def _counts(batches: list[Batch]) -> dict[str, int]:
    return {name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts}


def _sum_over_ranks(run: Run, values: dict[str, float]) -> dict[str, float]:
    total = run.world.all_reduce(torch.tensor(list(values.values()), dtype=torch.float64, device=run.device))
    return dict(zip(values, total.tolist(), strict=True))


def _are_finite(values: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, values.values()))


def _end_unless(
    finite: bool, run: Run, step: int, what: str, values: Mapping[str, float] = MappingProxyType({})
) -> None:
    """End the run where something is not finite: all ranks call it, with the same. Nothing more is saved."""
    if finite:
        return
    listed = f" ({', '.join(f'{name} {value:.4g}' for name, value in values.items())})" if values else ""
    last = run.checkpoints.find()
    kept = "no checkpoint was written" if last is None else f"the last checkpoint is still {last}"
    raise Diverged(f"step {step}: {what} is not finite{listed}: the training has diverged, and ends; {kept}")


def _measure(run: Run, step: int) -> float | None:
    """Held-out rows and tasks, whichever there are; what checkpoints are compared by, None without held-out rows."""
    held_out = None
    if run.validation is not None:
        held_out = measure(run.engine, run.validation, run.config, run.mesh, run.device)
        _end_unless(_are_finite(held_out), run, step, "what is measured", held_out)
    tasks = {} if run.tasks is None else run_tasks(run.engine, run.tasks)
    if held_out or tasks:
        run.log.record("eval", {"step": step, **(held_out or {}), **tasks})
    return None if held_out is None else headline(held_out, run.config)


def _read_rows(config: TrainConfig, tokenizer: Any, mesh: ParallelMesh) -> tuple[Rows, Rows | None]:
    """The first rank tokenizes; the others find the result in the cache of `datasets`."""

    def read(source: str, split: str) -> Rows:
        documents = load_documents(source, split, config.data, tokenizer)
        if config.objective == "lm":
            return PackedRows(documents, config.sequence_length, config.seed)
        return WindowRows(documents, config.sequence_length, config.context_length)

    held_out = config.data.validation
    with first_rank_first(mesh):
        train = read(config.data.train, config.data.train_split)
        validation = None if held_out is None else read(held_out, config.data.validation_split)
    if validation is not None and not len(validation):
        raise ValueError(f"data.validation ({held_out}) gives no row of sequence_length ({config.sequence_length})")
    return train, validation
