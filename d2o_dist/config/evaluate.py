"""`EvalConfig`: tasks x methods x budgets on one model, from YAML plus overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2o_dist.config.eval_tasks import TASK_CONFIGS, TaskConfig, task_from_dict, task_to_dict
from d2o_dist.config.infer import READINGS, InferConfig
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.fields.checks import check_int, check_number, check_string, take_path
from d2o_dist.fields.io import build, check_choice, load_yaml
from d2o_dist.fields.overrides import apply_overrides
from d2o_dist.fields.show import clip, shown
from d2o_dist.policy.budget import BudgetRule
from d2o_dist.policy.config import SIZES, D2OConfig
from d2o_dist.policy.presets import PRESETS

QUESTIONS = ("visible", "hidden")
EVAL_TRUNCATIONS = ("middle", "error")
FULL = "full"
MINIMUM = "min_layer_tokens"
# A method says which: what `auto` means depends on its rules.
EVAL_READINGS = tuple(reading for reading in READINGS if reading != "auto")


@dataclass(frozen=True)
class Method:
    """One way to compress, at one budget.

    Attributes:
        name: of the rule; budget: `100%`, `20%` or `1024 tokens`, as in tables.
        d2o: the whole configuration.
        reading: when a prompt is compressed; see `InferConfig`.
    """

    name: str
    budget: str
    d2o: D2OConfig
    reading: str = "whole"

    @property
    def label(self) -> str:
        """Name and budget: what records call it."""
        return self.name if self.name == FULL else f"{self.name}@{self.budget}"


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation.

    Attributes:
        model, model_kind, tokenizer, dtype, device, trust_remote_code, trust_pickled_weights, revision: as in
            `InferConfig`.
        output: folder of the results. Rows that it holds already are not run again.
        tasks: what is evaluated: mappings with a `kind` (needle, ruler, longbench, jsonl, perplexity, fidelity) and
            fields.
        methods: presets by name, or mappings of `name`, `preset` and fields. `full` is always run, and comes first. A
            mapping may also have a `reading`: `whole` (one prefill serves all such methods), `layerwise` or `stream`
            (each reads its prompts itself, as `launch/infer.py` would).
        keep_ratios, keep_tokens: the budgets; every method but `full` runs at each of them.
        min_layer_tokens: of methods that name none, by themselves or in their preset; null: the default's. A small one
            compares methods at the ratios that are asked for, also on short prompts.
        reference: one of the methods; tables show how far each other one is from it, row by row, at the same budget.
        question: whether the question is `visible` when the cache is compressed, or `hidden`: read afterwards.
        chat_template, system_prompt: as in `InferConfig`; `auto`: where the tokenizer has a template and the task
            allows it.
        max_prompt_bytes: as in `InferConfig`.
        max_prompt_tokens: longest prompt; null: what the model's positions leave beside the generated tokens.
        truncation: of longer prompts: `middle` (the middle of the context is cut out) or `error`.
        batch_size, max_batch_tokens: rows of one batch at most, and their prompt tokens, padding included.
        prefill_chunk: prompt tokens of one forward; null: all at once.
        seed: of everything that tasks draw at random.
        parallel: how ranks are used.
    """

    model: str
    output: str
    tasks: tuple[TaskConfig, ...]
    methods: tuple[Mapping[str, Any], ...] = ("d2o", "snapkv")
    keep_ratios: tuple[float, ...] = ()
    keep_tokens: tuple[int, ...] = ()
    min_layer_tokens: int | None = None
    reference: str | None = None
    question: str = "visible"
    model_kind: str = InferConfig.model_kind
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    trust_pickled_weights: bool = False
    revision: str | None = None
    chat_template: str = "auto"
    system_prompt: str | None = None
    max_prompt_tokens: int | None = None
    max_prompt_bytes: int = InferConfig.max_prompt_bytes
    truncation: str = "middle"
    batch_size: int = 1
    max_batch_tokens: int = 65536
    prefill_chunk: int | None = None
    seed: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        take_path(self, "output")
        if not isinstance(self.tasks, (list, tuple)) or not self.tasks:
            raise ValueError(f"tasks ({shown(self.tasks)}) must be a list of at least one task")
        for task in self.tasks:
            if not isinstance(task, tuple(TASK_CONFIGS.values())):
                raise ValueError(
                    f"tasks has a {type(task).__name__}; give mappings with a kind to EvalConfig.from_dict"
                )
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'{names.count(name)} tasks have the name "{clip(name)}": give each its own')
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for name in ("keep_ratios", "keep_tokens"):
            values = getattr(self, name)
            values = (values,) if isinstance(values, (int, float)) else values
            if not isinstance(values, (list, tuple)):
                raise ValueError(f"{name} ({shown(values)}) must be a list of numbers")
            for value in values:
                check_number(name, value)
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        object.__setattr__(self, "methods", tuple(_method_fields(value) for value in _as_list(self.methods)))
        check_choice("question", self.question, QUESTIONS)
        check_choice("truncation", self.truncation, EVAL_TRUNCATIONS)
        check_int("batch_size", self.batch_size, low=1)
        check_int("max_batch_tokens", self.max_batch_tokens, low=1)
        check_int("seed", self.seed, low=0)
        if self.min_layer_tokens is not None:
            check_int(MINIMUM, self.min_layer_tokens, low=0)
        if not isinstance(self.parallel, ParallelConfig):
            raise ValueError(f"parallel must be a ParallelConfig, not {type(self.parallel).__name__}")
        if self.reference is not None:
            # The distance from `full`, at whatever budget, is in every table.
            names = [method["name"] for method in self.methods if method["name"] != FULL]
            check_choice("reference", self.reference, names)
        self.infer()
        self.expand_methods()

    def infer(self) -> InferConfig:
        """What the engine needs to load model and tokenizer."""
        names = ("model", "model_kind", "tokenizer", "dtype", "device", "trust_remote_code", "trust_pickled_weights",
                 "revision", "chat_template", "system_prompt", "max_prompt_tokens", "max_prompt_bytes", "prefill_chunk",
                 "parallel")  # fmt: skip
        return InferConfig(**{name: getattr(self, name) for name in names})

    def expand_methods(self) -> list[Method]:
        """`full`, then every method at every budget.

        Raises:
            ValueError: an unknown preset or field, a size inside a method, a budget outside its limits, or no budget;
                two methods of one name, or two budgets that tables would show alike.
        """
        expanded = [Method(FULL, "100%", D2OConfig.preset(FULL))]
        others = [fields for fields in self.methods if fields["name"] != FULL]
        if others and not self.keep_ratios and not self.keep_tokens:
            raise ValueError("keep_ratios and keep_tokens are both empty: give at least one budget")
        sizes = [("keep_ratio", ratio, f"{100 * ratio:g}%") for ratio in self.keep_ratios]
        sizes += [("keep_tokens", count, f"{count} tokens") for count in self.keep_tokens]
        for fields in others:
            fields = dict(fields)
            name, reading = fields.pop("name"), fields.pop("reading", Method.reading)
            if self.min_layer_tokens is not None:
                fields = _with_minimum(fields, self.min_layer_tokens)
            for size, value, budget in sizes:
                try:
                    check_choice("reading", reading, EVAL_READINGS)
                    d2o = D2OConfig.from_dict({**fields, size: value})
                    d2o.check_reading(reading)
                    expanded.append(Method(name, budget, d2o, reading))
                except ValueError as error:
                    raise ValueError(f"method {clip(name)} at {budget}: {error}") from error
        labels = [method.label for method in expanded]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f'{labels.count(label)} methods would be called "{clip(label)}" in results: give each a name of '
                    "its own, and budgets that differ in their first 6 digits"
                )
        return expanded

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvalConfig:
        """From nested mappings; unknown keys are refused at every level."""
        if not isinstance(values, Mapping):
            raise ValueError(f"EvalConfig must be given as a mapping of fields, not {type(values).__name__}")
        values = dict(values)
        for name, what in (("model", "a folder or a hub model"), ("output", "a folder"), ("tasks", "a list of tasks")):
            if values.get(name) is None:
                raise ValueError(f"{name} is missing: name {what}")
        if isinstance(values["tasks"], (list, tuple)):
            values["tasks"] = tuple(
                task if isinstance(task, tuple(TASK_CONFIGS.values())) else task_from_dict(task)
                for task in values["tasks"]
            )
        if not isinstance(values.get("parallel"), ParallelConfig):
            values["parallel"] = build(ParallelConfig, {} if values.get("parallel") is None else values["parallel"])
        return build(cls, values)

    @classmethod
    def load(cls, path: str | Path | None, overrides: Iterable[tuple[str, Any]] = ()) -> EvalConfig:
        """From a YAML file (or nothing) and `(dotted key, value)` pairs that take precedence."""
        return cls.from_dict(apply_overrides({} if path is None else load_yaml(path), overrides))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values; `from_dict` is its inverse."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {
            **values,
            "tasks": [task_to_dict(task) for task in self.tasks],
            "methods": [dict(method) for method in self.methods],
            "parallel": self.parallel.to_dict(),
        }


def _with_minimum(fields: Mapping[str, Any], minimum: int) -> dict[str, Any]:
    """A method's fields with `budget.min_layer_tokens`, unless they or their preset name it."""
    budget = fields.get("budget", {})
    budget = {"rule": budget} if isinstance(budget, str) else budget
    preset = fields.get("preset")
    preset = PRESETS.get(preset if isinstance(preset, str) else "", PRESETS["d2o"])
    named = preset["budget"].min_layer_tokens != BudgetRule.min_layer_tokens
    if named or not isinstance(budget, Mapping) or MINIMUM in budget:
        return dict(fields)
    return {**fields, "budget": {**budget, MINIMUM: minimum}}


def _as_list(methods: Any) -> list[Any]:
    if isinstance(methods, (str, Mapping)):
        return [methods]
    if not isinstance(methods, (list, tuple)):
        raise ValueError(f"methods ({shown(methods)}) must be a list of presets or mappings")
    return list(methods)


def _method_fields(value: Any) -> dict[str, Any]:
    """A method as a mapping of `name`, `preset` and fields."""
    if isinstance(value, str):
        check_choice("methods", value, PRESETS)
        return {"name": value, "preset": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"methods has {shown(value)}; a method is a preset's name or a mapping of fields")
    fields = dict(value)
    check_string("a method's name", fields.get("name"))
    for size in SIZES:
        if size in fields:
            raise ValueError(
                f"method {clip(fields['name'])} sets {size}: budgets are given once, by keep_ratios or keep_tokens"
            )
    if fields["name"] == FULL and (len(fields) != 2 or shown(fields.get("preset")) != shown(FULL)):
        raise ValueError('the method "full" is the uncompressed cache: give another name to a variant')
    return fields
