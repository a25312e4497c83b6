"""A model class for EleutherAI's lm-evaluation-harness: any of its tasks, with a compressed cache.

`register()` makes `--model d2o_dist` known to the harness. What is compressed when:

- `generate_until`: the whole prompt is read, then compressed, then tokens are generated, as in inference.
- `loglikelihood`: the context but its last token is read and compressed; that token and the continuation follow. So all
  of the continuation is predicted from the compressed cache. (After a full prefill its first token would not be.)
- `loglikelihood_rolling`: a text is read in segments; each is predicted from the compressed cache of those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from torch import Tensor
from tqdm import tqdm

from d2o_dist.comm import Collectives, ParallelMesh, build_mesh, init_distributed, read_environment
from d2o_dist.comm.request import RequestRanks
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.encode import Request
from d2o_dist.engine.loop import Running
from d2o_dist.engine.scheduler import Room, Scheduler, longest_first
from d2o_dist.engine.session import Session
from d2o_dist.engine.startup import check_same_run
from d2o_dist.engine.steady import agreed_rows
from d2o_dist.eval.continuation import continuation_logits, lost_rows
from d2o_dist.eval.reading import Reading
from d2o_dist.fields.checks import check_int
from d2o_dist.fields.overrides import apply_overrides
from d2o_dist.models import loading
from d2o_dist.policy.config import SIZES, D2OConfig
from d2o_dist.slots.slots import stats_dtype

NAME = "d2o_dist"
MAX_POSITIONS_IF_UNKNOWN = 2048
HARNESS_DEVICE = "cuda:0"
# Generation arguments of tasks that mean something here; the harness passes others on, such as `min_p`.
_SAMPLING = ("temperature", "top_p", "top_k")


class D2OLM(TemplateLM):
    """The harness's model arguments.

    Args:
        pretrained: folder or hub name; tokenizer, dtype, device, trust_remote_code, trust_pickled_weights, revision: as
            in `InferConfig`.
        preset, keep_ratio, keep_tokens, fields: how the cache is compressed: a preset, a size, and any other fields of
            `D2OConfig`. `preset=full` is the reference.
        batch_size, max_batch_tokens: rows that run at once, and their tokens, at most (`engine.scheduler.Room`).
        max_gen_toks: tokens generated where a task does not say.
        max_length: longest prompt with its answer; the model's positions by default.
        rolling_segment: tokens of a segment of `loglikelihood_rolling`.
        mesh: replicas that share the documents; all ranks that were started by default.

    Raises:
        ValueError: an unknown argument, a bad value, a model that cannot be loaded or compressed.
        FloatingPointError: by a request, whose logits are NaN or infinite: the harness has no rows with errors.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        trust_pickled_weights: bool = False,
        revision: str | None = None,
        preset: str = "d2o",
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_batch_tokens: int = 65536,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        prefill_chunk: int | None = None,
        rolling_segment: int = 256,
        mesh: ParallelMesh | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size ({batch_size}) must be a number of rows; `auto` is not known here")
        if int(rolling_segment) < 2:
            raise ValueError(f"rolling_segment ({rolling_segment}) must be at least 2")
        for name, value, low in (("max_length", max_length, 2), ("max_batch_tokens", max_batch_tokens, 1)):
            if value is not None:
                check_int(name, int(value), low=low)
        sizes = dict(zip(SIZES, (keep_ratio, keep_tokens), strict=True))
        self.d2o = D2OConfig.preset(preset, **sizes, **apply_overrides({}, fields.items()))
        config = InferConfig(
            model=pretrained, tokenizer=tokenizer, dtype=dtype, device=_device(device, read_environment().world_size),
            trust_remote_code=trust_remote_code, trust_pickled_weights=trust_pickled_weights, revision=revision,
            prefill_chunk=prefill_chunk,
        )  # fmt: skip
        mesh = mesh or build_mesh(dp=init_distributed("gloo" if config.device == "cpu" else None).world_size)
        limits = {"max_gen_toks": max_gen_toks, "max_length": max_length, "rolling_segment": rolling_segment}
        check_same_run(mesh, {**config.to_dict(), "d2o": self.d2o.to_dict(), **limits}, config)
        self._world = Collectives(mesh.axis("world"))
        self._rank, self._world_size = mesh.rank, mesh.world_size
        self.tokenizer = loading.load_tokenizer(config)
        self.model = loading.load_model(config, mesh)
        # As the model takes it; refuses what it cannot serve, before any task is read.
        self.d2o = Session(self.model, self.d2o).cache.d2o
        self._device = self.model.device
        self._pad_id = loading.pad_id(self.tokenizer)
        self._eos_ids = loading.eos_ids(self.model, self.tokenizer)
        self._batch_size, self._max_batch_tokens = int(batch_size), int(max_batch_tokens)
        alone = self._batch_size == 1
        self._steady = 1 if alone else agreed_rows(self.model.model, self._device, Collectives(mesh.axis("request")))
        self._max_gen_toks, self._chunk, self._segment = int(max_gen_toks), prefill_chunk, int(rolling_segment)
        positions = self.model.shape.max_positions or MAX_POSITIONS_IF_UNKNOWN
        self.max_length = min(int(max_length or positions), positions)

    # ---- what the harness asks of a model ------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts, and begins those that have no context."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before texts without context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of the harness's request caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a beginning-of-text token that a template wrote already is not added again."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Of all replicas, one after the other."""
        return self._world.all_gather(tensor.reshape(-1), 0)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Of all replicas, on rank `dst`."""
        everything = self._world.all_gather_object(obj)
        return everything if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all replicas."""
        self._world.barrier()

    # ---- requests ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to `(context, generation arguments)`; contexts that are too long lose their beginning."""
        jobs = []
        for place, (context, arguments) in enumerate(request.args for request in requests):
            arguments = dict(arguments)
            until = arguments.get("until") or ()
            until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
            max_new = int(arguments.get("max_gen_toks") or arguments.get("max_new_tokens") or self._max_gen_toks)
            if max_new >= self.max_length:
                raise ValueError(f"max_gen_toks ({max_new}) must be below max_length ({self.max_length})")
            ids = (self.tok_encode(context) or [self.prefix_token_id])[max_new - self.max_length :]
            jobs.append((_sampling(arguments), Request(place, place, tuple(ids), max_new, until)))
        answers = [""] * len(jobs)
        room = Room(self._batch_size, self._max_batch_tokens, self.model.shape.border)
        with self._progress(len(jobs), disable_tqdm) as bar:
            for sampling in dict.fromkeys(each for each, _ in jobs):
                own = [request for each, request in jobs if each == sampling]
                scheduler = Scheduler(
                    iter(longest_first(own)), partial(self._read, sampling), room, on_failure=_give_up
                )  # fmt: skip
                for ended in scheduler.run():
                    for request, result in ended:
                        if result.error is not None:
                            raise FloatingPointError(f"request {request.index}: {result.error}")
                        answers[request.index] = result.text
                        self.cache_hook.add_partial("generate_until", requests[request.index].args, result.text)
                    bar.update(len(ended))
        return answers

    def _read(self, sampling: SamplingConfig, requests: Sequence[Request]) -> Running:
        return Running(
            Session(self.model, self.d2o, steady=self._steady), requests, sampling, self.tokenizer,
            eos_ids=self._eos_ids, pad_id=self._pad_id, chunk=self._chunk,
        )  # fmt: skip

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """`(log-probability, whether greedy decoding gives it)`; a context is read once for all its continuations."""
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            room = self.max_length - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens must be shorter than max_length ({self.max_length})"
                )
            by_context.setdefault(tuple(context[-room:]), []).append(place)
        with self._progress(len(requests), disable_tqdm) as bar:
            for context, places in by_context.items():
                # The last token of the context is read after the compression, unless it is all there is.
                split = max(len(context) - 1, 1)
                reading = Reading(self.model, [context[:split]], [self.d2o], pad_id=self._pad_id, chunk=self._chunk)
                for place in places:
                    strings, _, continuation = requests[place]
                    follows = [*context[split:], *continuation]
                    logits = continuation_logits(reading.start(self.d2o), [follows], "chunk")[
                        0, len(follows) - len(continuation) :
                    ]
                    results[place] = _score(logits, continuation)
                    self.cache_hook.add_partial("loglikelihood", strings, results[place])
                    bar.update(1)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, segment by segment; a text longer than `max_length` begins anew there."""
        totals = []
        with self._progress(len(requests), disable_tqdm) as bar:
            for (text,) in (request.args for request in requests):
                ids = self.tok_encode(text, add_special_tokens=False)
                total = sum(self._roll(ids[start : start + self.max_length - 1])
                            for start in range(0, len(ids), self.max_length - 1))  # fmt: skip
                totals.append(total)
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
                bar.update(1)
        return totals

    @torch.inference_mode()
    def _roll(self, ids: Sequence[int]) -> float:
        """One text that fits: each segment attends itself and the compressed cache of what came before."""
        inputs, total = [self.prefix_token_id, *ids[:-1]], 0.0
        session: Any = None
        for start, end in segments(len(inputs), self._segment):
            if session is None:
                reading = Reading(self.model, [inputs[:end]], [self.d2o], pad_id=self._pad_id, all_logits=True)
                logits, session = reading.logits, reading.start(self.d2o)
            else:
                logits = session.read([inputs[start:end]], all_logits=True)
            session.cache.finalize()
            total += _score(logits[0], ids[start:end], start)[0]
        return total

    def _progress(self, total: int, disabled: bool) -> tqdm:
        return tqdm(total=total, disable=disabled or self.rank != 0, desc=NAME)


def segments(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Places where segments start and end; none but a text of one token has one token, which would be a decode step."""
    start = 0
    while start < length:
        end = length if length - start <= size + 1 else start + size
        yield start, end
        start = end


def _score(logits: Tensor, tokens: Sequence[int], start: int = 0) -> tuple[float, bool]:
    """Sum of the log-probabilities of `tokens` (n of them) under logits [n, V], and whether each is the likeliest.

    Args:
        start: tokens that were scored before these, for the message.

    Raises:
        FloatingPointError: logits that are NaN or infinite: the harness would take them for a wrong answer.
    """
    (error,) = lost_rows(logits[None], RequestRanks.alone(), start=start)
    if error is not None:
        raise FloatingPointError(error)
    targets = torch.tensor(list(tokens), device=logits.device)
    log_probs = logits.to(stats_dtype(logits.dtype)).log_softmax(-1).gather(-1, targets[:, None])
    return float(log_probs.double().sum()), bool((logits.argmax(-1) == targets).all())


def _device(name: str | None, world_size: int) -> str:
    """The device of `InferConfig`. What the harness means if nothing is said is one GPU; ranks have one each."""
    return "cuda" if name == HARNESS_DEVICE and world_size > 1 else name or "auto"


def _give_up(requests: Sequence[Request], error: Exception) -> None:
    raise error


def _sampling(arguments: dict[str, Any]) -> SamplingConfig:
    """Greedy, unless a task asks for sampling: by `do_sample` or, where that is not said, by a temperature."""
    known = {name: arguments[name] for name in _SAMPLING if arguments.get(name) is not None}
    do_sample = arguments.get("do_sample")
    if not (known.get("temperature") if do_sample is None else do_sample):
        return SamplingConfig()
    return SamplingConfig(**{"temperature": 1.0, **known})


def register() -> None:
    """Make the model known to the harness under `d2o_dist`. Registering twice does no harm."""
    # The harness registers its own models when one is asked for, but only if there is none by then.
    import lm_eval.models  # noqa: F401

    if NAME not in model_registry:
        model_registry.register(NAME)(D2OLM)
