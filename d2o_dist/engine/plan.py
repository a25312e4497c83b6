"""What a run will do, and everything that can be wrong with it, found before the weights are loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.cuda_graph import check_graph
from d2o_dist.engine.encode import BadRow, Request, encode_rows
from d2o_dist.engine.output import check_shared
from d2o_dist.engine.paths import inputs_of
from d2o_dist.engine.prompts import read_prompts, repeated_ids
from d2o_dist.engine.resume import Job, check_job, describe
from d2o_dist.engine.room import refuse_too_long
from d2o_dist.engine.trace import check_trace
from d2o_dist.fields.show import shown
from d2o_dist.files.whole import reason
from d2o_dist.models import loading
from d2o_dist.models.cache import ModelCache
from d2o_dist.models.device import pick_device


@dataclass(frozen=True)
class InferPlan:
    """What a run will do.

    Attributes:
        requests, bad_rows: rows that will be run, and rows that cannot be.
        tokenizer: loaded already; warnings: what the user should know before the run.
        border: rows of up to so many tokens and longer ones are not read together; None: all may be.
        job: what the rows depend on, on rank 0.
    """

    requests: list[Request]
    bad_rows: list[BadRow]
    tokenizer: Any
    warnings: list[str]
    border: int | None = None
    job: Job = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the input."""
        return len(self.requests) + len(self.bad_rows)

    def notices(self) -> list[str]:
        """What to tell the user before the run: the warnings, and the first bad rows."""
        return [*self.warnings, *(f"row {bad.index} ({shown(bad.id)}): {bad.error}" for bad in self.bad_rows[:10])]


def prepare(config: InferConfig, mesh: ParallelMesh | None = None, config_file: str | None = None) -> InferPlan:
    """Read and check everything that needs no weights. Every rank of the mesh calls it together, and gets the same.

    Args:
        config_file: what the configuration was read from, so that it is not written over.

    Raises:
        ValueError: a file that is missing or in the way, or read and written at once, a model that cannot be compressed
            or divided among the ranks, a budget its layers cannot have, a device that is not there, CUDA graphs that
            are impossible, streaming of several prompts; on whichever rank. What is wrong with one row is not raised.
    """
    mesh = ParallelMesh.local() if mesh is None else mesh
    with agreed(mesh) as same:
        plan = _prepare(config, mesh, config_file)
        same.add("the configuration", config)
        same.add("the prompts or the tokenizer", plan.requests, plan.bad_rows)
    check_shared(config.output, mesh)
    return plan


def _prepare(config: InferConfig, mesh: ParallelMesh, config_file: str | None) -> InferPlan:
    rows = read_prompts(config.prompts, config.prompt)
    if config.stream is True and len(rows) != 1:
        raise ValueError(f"stream (true) shows one prompt, but there are {len(rows)}")
    if config.stream is True and mesh.dp > 1:
        raise ValueError(f"stream (true) shows the text of one replica, but there are {mesh.dp} (dp)")
    if config.trace is not None:
        _make_folder(Path(config.trace))
        check_trace(Path(config.trace), mesh.rank)
    device, shape = pick_device(config.device), loading.describe(config)
    # An empty cache costs nothing, and refuses what it cannot serve.
    cache = ModelCache(shape, config.d2o, mesh, config.parallel)
    no_graph = check_graph(config.decode_graph, shape, device, cache.ranks)
    _check_lengths(config, shape.max_positions)
    tokenizer = loading.load_tokenizer(config)
    encoded = refuse_too_long(encode_rows(rows, tokenizer, config, shape), config, device)
    warnings = [f"{len(repeated)} ids are used more than once, such as {shown(next(iter(repeated)))}: tell rows apart "
                "by their index" for repeated in [repeated_ids(rows)] if repeated]  # fmt: skip
    if no_graph and config.decode_graph == "auto" and device.type == "cuda":
        warnings.append(f"decode steps are run by Python, not as a CUDA graph: {no_graph}")
    requests = [row for row in encoded if isinstance(row, Request)]
    bad_rows = [row for row in encoded if isinstance(row, BadRow)]
    job: Job = {}
    if mesh.rank == 0:  # the output need not be reachable, nor be empty by the time others look
        job = describe(dataclasses.replace(config, d2o=cache.d2o), requests, bad_rows)  # with the shares of a profile
        check_job(config, job, mesh.dp, list(inputs_of(config, config_file)))
    return InferPlan(
        requests=requests,
        bad_rows=bad_rows,
        tokenizer=tokenizer,
        warnings=warnings,
        border=shape.border,
        job=job,
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"trace folder {path} cannot be made: {reason(error)}") from error


def _check_lengths(config: InferConfig, max_positions: int | None) -> None:
    """Refuse limits of the run that the model has no positions for; rows with limits of their own come later."""
    prompt, new = config.max_prompt_tokens, config.sampling.max_new_tokens
    if max_positions is not None and prompt is not None and prompt + new > max_positions:
        raise ValueError(
            f"max_prompt_tokens ({prompt}) and max_new_tokens ({new}) are together above the model's "
            f"max_position_embeddings ({max_positions})"
        )
