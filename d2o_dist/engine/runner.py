"""A whole inference run: everything that can be wrong is found first, then the weights are loaded, then batches run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from d2o_dist.cache.report import CacheReport
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine import model as loading
from d2o_dist.engine.batching import make_batches
from d2o_dist.engine.encode import BadRow, ModelLimits, Request, encode_rows
from d2o_dist.engine.loop import generate
from d2o_dist.engine.prompts import read_prompts, repeated_ids
from d2o_dist.engine.records import Record, RecordWriter, check_output, error_record, make_record
from d2o_dist.engine.session import Session
from d2o_dist.engine.summary import Summary, summarise
from d2o_dist.integrations.hf import D2OCache


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        requests, bad_rows: rows that will be run, and rows that cannot be.
        tokenizer: loaded already; warnings: what the user should know before the run.
    """

    requests: list[Request]
    bad_rows: list[BadRow]
    tokenizer: Any
    warnings: list[str]

    @property
    def num_rows(self) -> int:
        """Rows of the input."""
        return len(self.requests) + len(self.bad_rows)


def prepare(config: InferConfig) -> Plan:
    """Read and check everything that needs no weights.

    Raises:
        ValueError: a file that is missing or in the way, a model that cannot be compressed, a budget its layers cannot
            have, a device that is not there, streaming of several prompts. What is wrong with one row is not raised.
    """
    rows = read_prompts(config.prompts, config.prompt)
    if config.stream is True and len(rows) != 1:
        raise ValueError(f"stream (true) shows one prompt, but there are {len(rows)}")
    check_output(config.output, config.overwrite)
    loading.pick_device(config.device)
    model_config = loading.load_config(config)
    # An empty cache costs nothing, and refuses what it cannot serve.
    D2OCache(config=model_config, d2o=config.d2o)
    tokenizer = loading.load_tokenizer(config)
    limits = ModelLimits(loading.max_positions(model_config), loading.vocab_size(model_config))
    encoded = encode_rows(rows, tokenizer, config, limits)
    warnings = [f"{len(repeated)} ids are used more than once, such as {next(iter(repeated))!r}: tell rows apart by "
                "their index" for repeated in [repeated_ids(rows)] if repeated]  # fmt: skip
    return Plan(
        requests=[row for row in encoded if isinstance(row, Request)],
        bad_rows=[row for row in encoded if isinstance(row, BadRow)],
        tokenizer=tokenizer,
        warnings=warnings,
    )


class Runner:
    """Runs the requests of a plan, batch after batch.

    Args:
        on_text: called with pieces of text as they come; on_report: with a batch's cache report when it is done.
        log: called with a line about something that went wrong and was dealt with.
    """

    def __init__(
        self,
        config: InferConfig,
        model: Any,
        tokenizer: Any,
        *,
        on_text: Callable[[str], None] | None = None,
        on_report: Callable[[CacheReport], None] | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.eos_ids = loading.eos_ids(model, tokenizer)
        self.pad_id = loading.pad_id(tokenizer)
        self._on_text, self._on_report, self._log = on_text, on_report, log

    def run_batch(self, batch: Sequence[Request]) -> list[Record]:
        """The records of one batch. If it fails as a whole, its rows are tried one by one; never an exception."""
        records, error = self._try(batch)
        if error is None:
            return records
        if len(batch) == 1:
            self._log(f"row {batch[0].index} ({batch[0].id!r}) failed: {error}")
            return [error_record(batch[0], error)]
        self._log(f"a batch of {len(batch)} rows failed ({error}); its rows are tried one by one")
        return [record for request in batch for record in self.run_batch([request])]

    def _try(self, batch: Sequence[Request]) -> tuple[list[Record], str | None]:
        try:
            session = Session(self.model, self.config.d2o)
            results = generate(
                session, batch, self.config.sampling, self.tokenizer, eos_ids=self.eos_ids, pad_id=self.pad_id,
                chunk=self.config.prefill_chunk, on_text=self._on_text,
            )  # fmt: skip
            if self._on_report is not None:
                self._on_report(session.cache.report())
            return [make_record(request, result) for request, result in zip(batch, results, strict=True)], None
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        # Out of the except block, so that the traceback lets go of the failed batch's tensors before the next try.
        session = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [], message


def run(
    config: InferConfig,
    plan: Plan,
    *,
    on_text: Callable[[str], None] | None = None,
    on_report: Callable[[CacheReport], None] | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
    log: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Load the weights, run the plan and write the records; an interruption keeps what is written.

    Args:
        on_text, on_report, log: see `Runner`; with `on_text` nothing else goes to standard output.
        on_rows: called with the number of rows that were just written.

    Raises:
        ValueError: the weights cannot be loaded. Nothing is written then, and no earlier output is replaced.
    """
    runner = None
    if plan.requests:
        model = loading.load_model(config)
        runner = Runner(config, model, plan.tokenizer, on_text=on_text, on_report=on_report, log=log)
    lengths = [len(request.input_ids) for request in plan.requests]
    batches = make_batches(lengths, config.max_batch_size, config.max_batch_tokens)
    interrupted, began = False, time.perf_counter()
    with RecordWriter(config.output, quiet=on_text is not None) as writer:
        try:
            writer.write(error_record(row) for row in plan.bad_rows)
            on_rows(len(plan.bad_rows))
            for places in batches:
                writer.write(runner.run_batch([plan.requests[place] for place in places]))
                on_rows(len(places))
        except KeyboardInterrupt:
            interrupted = True
        wall_s = time.perf_counter() - began
        writer.sort()
        return summarise(writer.records, plan.num_rows, wall_s, interrupted=interrupted)
