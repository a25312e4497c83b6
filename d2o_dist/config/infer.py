"""`InferConfig`: everything one inference run is told, from YAML plus overrides."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.fields.checks import check_bool, check_int, check_string, take_path
from d2o_dist.fields.io import build, check_choice, load_yaml
from d2o_dist.fields.overrides import apply_overrides
from d2o_dist.fields.show import clip, shown
from d2o_dist.policy.config import D2OConfig

MODEL_KINDS = ("transformers", "megatron")
DTYPES = ("auto", "bfloat16", "float32", "float16", "float64")
CHAT_TEMPLATES = ("auto", "never", "always")
READINGS = ("auto", "whole", "layerwise", "stream")
DECODE_GRAPHS = ("auto", "always", "never")
TRUNCATIONS = ("error", "middle", "left")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_SECTIONS = {"sampling": SamplingConfig, "parallel": ParallelConfig}


@dataclass(frozen=True)
class InferConfig:
    """One inference run.

    Attributes:
        model: folder or hub name of a Hugging Face causal language model; of `model_kind: megatron`, the folder of a
            distributed checkpoint with its `megatron.yaml`.
        model_kind: which library the model is of: `transformers` or `megatron`.
        tokenizer: folder or hub name; the model's own when null. A Megatron checkpoint has none.
        dtype: of weights and cache; `auto` is what the checkpoint was saved in, but float32 for a half-precision
            one on a CPU (where half precision is slower by far).
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`; of several ranks each takes its own GPU.
        d2o: how the cache is compressed; in YAML a mapping of fields, `preset` among them.
        sampling: how tokens are chosen; a mapping in YAML.
        parallel: over how many ranks, and how; a mapping in YAML.
        prompts: file of prompts, `.jsonl` (a row a line) or `.txt` (one prompt).
        prompt: one prompt, instead of a file.
        output: JSONL file of results; null or `-` writes to standard output (with one replica only).
        overwrite: replace `output` if it exists; otherwise that is an error. A job that torchrun or Slurm starts again
            goes on with its own.
        resume: go on with an `output` that this job (settings, model, prompts) has begun; false: refuse it.
        retry_failed: when going on, run rows again that ended with an error.
        chat_template: `always` (wrap a bare prompt as a user message), `never` (bare text only), `auto` (`always`
            where the tokenizer has a template).
        system_prompt: system message of chats that bring none.
        max_batch_size: rows that run at once, at most.
        max_batch_tokens: tokens that they take memory for, at most: a prompt that is read, and what rows that decode
            keep at most (`engine.scheduler.Room`); a longer row runs alone.
        reading: when a prompt is compressed: `whole` (when all layers have read it), `layerwise` (each layer as soon as
            it has, so that the whole cache is never in memory), `auto` (`layerwise` where it suits rules and model),
            `stream` (after every `prefill_chunk` tokens, so that memory does not grow with the text; loses more).
        prefill_chunk: prompt tokens of one forward, or of one tile of a layer where `reading` is layer by layer; null:
            the whole prompt at once, tiles of 4096, or 2048 of a stream.
        decode_graph: whether decode steps are CUDA graphs, captured once and replayed: `auto` (where that is
            possible), `always` (an error where it is not), `never`.
        max_prompt_tokens: longest prompt, in tokens; null: what the model's positions leave beside `max_new_tokens`.
        max_prompt_bytes: longest prompt, in bytes of UTF-8 with its chat template. A longer one is refused before it is
            tokenized, which takes over a hundred bytes of memory for each of them.
        truncation: what happens to a longer prompt: `error`, `middle` (keep both ends), `left` (keep the end).
        stream: show the text of a single prompt as it comes: true, false, or `auto` (on a terminal).
        trace: folder for what each rank sent (JSON) and a profile of one decode step (Chrome trace); null: neither.
        trust_remote_code, revision: as in `from_pretrained`.
        trust_pickled_weights: read `.bin` files too, where a model has no safetensors.
    """

    model: str
    model_kind: str = "transformers"
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    d2o: D2OConfig = field(default_factory=D2OConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    prompts: str | None = None
    prompt: str | None = None
    output: str | None = None
    overwrite: bool = False
    resume: bool = True
    retry_failed: bool = False
    chat_template: str = "auto"
    system_prompt: str | None = None
    max_batch_size: int = 8
    max_batch_tokens: int = 65536
    reading: str = "auto"
    prefill_chunk: int | None = None
    decode_graph: str = "auto"
    max_prompt_tokens: int | None = None
    max_prompt_bytes: int = 2**23
    truncation: str = "error"
    stream: str | bool = "auto"
    trace: str | None = None
    trust_remote_code: bool = False
    trust_pickled_weights: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        take_path(self, "model")
        for name in ("tokenizer", "prompts", "output", "trace", "revision"):
            take_path(self, name, optional=True)
        for name in ("prompt", "system_prompt"):
            check_string(name, getattr(self, name), optional=True)
        check_choice("model_kind", self.model_kind, MODEL_KINDS)
        if self.model_kind == "megatron" and self.tokenizer is None:
            raise ValueError("tokenizer is missing: a Megatron checkpoint has none, so name a folder or a hub model")
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("chat_template", self.chat_template, CHAT_TEMPLATES)
        check_choice("decode_graph", self.decode_graph, DECODE_GRAPHS)
        check_choice("reading", self.reading, READINGS)
        check_choice("truncation", self.truncation, TRUNCATIONS)
        check_int("max_batch_size", self.max_batch_size, low=1)
        check_int("max_batch_tokens", self.max_batch_tokens, low=1)
        if self.prefill_chunk is not None:
            # A forward of one token is a decode step.
            check_int("prefill_chunk", self.prefill_chunk, low=2)
        if self.max_prompt_tokens is not None:
            check_int("max_prompt_tokens", self.max_prompt_tokens, low=1)
        check_int("max_prompt_bytes", self.max_prompt_bytes, low=1)
        for name in ("trust_remote_code", "trust_pickled_weights", "overwrite", "resume", "retry_failed"):
            check_bool(name, getattr(self, name))
        if not isinstance(self.stream, bool) and not (isinstance(self.stream, str) and self.stream == "auto"):
            raise ValueError(f"stream ({shown(self.stream)}) must be one of auto, true, false")
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device ({shown(self.device)}) must be one of auto, cpu, cuda, cuda:N")
        for name, kind in (("d2o", D2OConfig), *_SECTIONS.items()):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, not {type(getattr(self, name)).__name__}")
        self.d2o.check_reading(self.reading)
        if self.prompts is not None and self.prompt is not None:
            raise ValueError(f"prompts ({clip(self.prompts)}) and prompt are two sources of prompts: give exactly one")
        if self.system_prompt is not None and self.chat_template == "never":
            raise ValueError('system_prompt needs a chat template, but chat_template is "never"')

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InferConfig:
        """From nested mappings; unknown keys are refused at every level."""
        if not isinstance(values, Mapping):
            raise ValueError(f"InferConfig must be given as a mapping of fields, not {type(values).__name__}")
        values = dict(values)
        if "model" not in values:
            raise ValueError("model is missing: name a folder or a hub model")
        if not isinstance(values.get("d2o"), D2OConfig):
            values["d2o"] = D2OConfig.from_dict({} if values.get("d2o") is None else values["d2o"])
        for name, kind in _SECTIONS.items():
            if not isinstance(values.get(name), kind):
                values[name] = build(kind, {} if values.get(name) is None else values[name])
        return build(cls, values)

    @classmethod
    def load(cls, path: str | Path | None, overrides: Iterable[tuple[str, Any]] = ()) -> InferConfig:
        """From a YAML file (or nothing) and `(dotted key, value)` pairs that take precedence.

        Raises:
            ValueError: an unknown key, or a value outside its limits.
        """
        overrides = list(overrides)
        values = {} if path is None else load_yaml(path)
        return cls.from_dict(apply_overrides(_forget_replaced_size(values, dict(overrides)), overrides))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values; `from_dict` is its inverse."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, **{name: values[name].to_dict() for name in ("d2o", *_SECTIONS)}}


def _forget_replaced_size(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values without the cache size that an override says in the other way, or that `full` has itself."""
    d2o = values.get("d2o")
    if not isinstance(d2o, dict):
        return values
    replaced = set()
    if overrides.get("d2o.preset") == "full":
        replaced = {"keep_ratio", "keep_tokens"}
    if overrides.get("d2o.keep_ratio") is not None:
        replaced.add("keep_tokens")
    if overrides.get("d2o.keep_tokens") is not None:
        replaced.add("keep_ratio")
    return {**values, "d2o": {key: value for key, value in d2o.items() if key not in replaced}}
