"""`TrainConfig`: everything one training run is told, from YAML plus overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2o_dist.config.distill import DistillConfig
from d2o_dist.config.eval_tasks import TASK_CONFIGS, TaskConfig, task_from_dict, task_to_dict
from d2o_dist.config.sampling import MAX_SEED
from d2o_dist.config.train_parts import DataConfig, EngineConfig, LoraOptions, OptimizerConfig, plain
from d2o_dist.fields.checks import check_bool, check_int, check_number, check_timeout, take_path
from d2o_dist.fields.io import build, check_choice, load_yaml, refuse_unknown
from d2o_dist.fields.overrides import apply_overrides
from d2o_dist.fields.show import shown
from d2o_dist.policy.config import D2OConfig

OBJECTIVES = ("lm", "d2o_lm", "d2o_distill")
TRAINING_DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
_PARTS = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "engine": EngineConfig,
    "lora": LoraOptions,
    "distill": DistillConfig,
}


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        model, tokenizer, revision, trust_remote_code, trust_pickled_weights: as in `InferConfig`.
        data: documents; see `DataConfig`.
        output: folder of checkpoints, log and exported model.
        objective: `lm` (full attention inside each packed document), `d2o_lm` (the context of each row is compressed,
            and the continuation is predicted from what is left), `d2o_distill` (the same, matching the full cache).
        sequence_length: tokens of a row.
        context_length: tokens of a row that are compressed (not for `lm`); the rest is the continuation.
        keep_ratio: `[low, high]`: every step draws its ratio evenly from it.
        d2o: how contexts are compressed; the sizes it names are replaced by the drawn ratio.
        distill: weights and teacher of `d2o_distill`.
        steps: optimizer steps of the whole run.
        global_batch_size: rows of a step, over all ranks.
        micro_batch_size: rows of one forward on one rank.
        sp: ranks that share the tokens of a row; the others work on other rows.
        timeout: seconds that a rank waits for another.
        dtype: of the forward and backward computations. The weights that are updated stay float32.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`.
        optimizer, engine, lora: see their classes; `lora: null` trains all weights.
        activation_checkpointing: keep one activation a layer and compute the others again in the backward pass.
        loss_tile: tokens whose logits exist at once.
        seed: of the data's order, the ratios and dropout.
        log_every, eval_every, save_every: in steps; null: never (the last step is always saved).
        eval_ratios: keep ratios that held-out rows and tasks are measured at.
        eval_tasks: tasks of an evaluation (needle, fidelity, ...; mappings with a `kind`) that are run every
            `eval_every` steps too, with the full cache and under `d2o` at each of `eval_ratios`.
        resume: go on from the last complete checkpoint in `output`, if there is one; false: refuse such an `output`.
    """

    model: str
    data: DataConfig
    output: str
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    trust_pickled_weights: bool = False
    objective: str = "lm"
    sequence_length: int = 4096
    context_length: int | None = None
    keep_ratio: tuple[float, float] = (0.1, 0.2)
    d2o: D2OConfig = field(default_factory=D2OConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    steps: int = 100
    global_batch_size: int = 8
    micro_batch_size: int = 1
    sp: int = 1
    timeout: float = 1800.0
    dtype: str = "float32"
    device: str = "auto"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    lora: LoraOptions | None = None
    activation_checkpointing: bool = False
    loss_tile: int = 1024
    seed: int = 0
    log_every: int = 1
    eval_every: int | None = None
    save_every: int | None = None
    eval_ratios: tuple[float, ...] = (0.1, 0.2)
    eval_tasks: tuple[TaskConfig, ...] = ()
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("model", "output"):
            take_path(self, name)
        for name in ("tokenizer", "revision"):
            take_path(self, name, optional=True)
        for name in ("trust_remote_code", "trust_pickled_weights", "activation_checkpointing", "resume"):
            check_bool(name, getattr(self, name))
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("dtype", self.dtype, TRAINING_DTYPES)
        check_choice("device", self.device, DEVICES)
        for name in ("steps", "global_batch_size", "micro_batch_size", "sp", "loss_tile", "log_every"):
            check_int(name, getattr(self, name), low=1)
        for name in ("eval_every", "save_every"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low=1)
        check_int("sequence_length", self.sequence_length, low=2)
        check_int("seed", self.seed, low=0, high=MAX_SEED)
        check_timeout(self.timeout)
        for name in ("keep_ratio", "eval_ratios"):
            object.__setattr__(self, name, _ratios(name, getattr(self, name)))
        for name, kind in (*_PARTS.items(), ("d2o", D2OConfig)):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "lora" and value is None):
                raise ValueError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
        self._check_tasks()
        self._check_compression()
        self._check_sharding()

    def _check_tasks(self) -> None:
        if not isinstance(self.eval_tasks, (list, tuple)):
            raise ValueError(f"eval_tasks ({shown(self.eval_tasks)}) must be a list of tasks")
        kinds = tuple(TASK_CONFIGS.values())
        tasks = tuple(task if isinstance(task, kinds) else task_from_dict(task) for task in self.eval_tasks)
        object.__setattr__(self, "eval_tasks", tasks)
        if tasks and self.eval_every is None:
            raise ValueError(f"eval_tasks has {len(tasks)} tasks, but eval_every is null: say how often to run them")
        if self.eval_every is not None and not tasks and self.data.validation is None:
            raise ValueError(
                f"eval_every ({self.eval_every}) has nothing to measure: data.validation is null, eval_tasks empty"
            )

    def _check_compression(self) -> None:
        if len(self.keep_ratio) != 2 or self.keep_ratio[0] > self.keep_ratio[1]:
            raise ValueError(f"keep_ratio ({list(self.keep_ratio)}) must be [low, high] with low <= high")
        if self.objective != "d2o_distill" and self.distill != DistillConfig():
            raise ValueError(f'distill is not used by objective "{self.objective}": leave it out, or set it to null')
        if self.objective == "lm":
            if self.context_length is not None:
                raise ValueError(f'context_length ({self.context_length}) is not used by objective "lm"')
            return
        if self.context_length is None:
            raise ValueError(f'objective "{self.objective}" needs context_length: how many tokens are compressed')
        check_int("context_length", self.context_length, low=1, high=self.sequence_length - 1)
        if not self.d2o.by_layer:
            raise ValueError(
                f"training compresses by layer, after one reading: d2o has score.rule {self.d2o.score.name}, "
                f"budget.rule {self.d2o.budget.name}, budget.per_head {self.d2o.budget.per_head}; score.rule reread, "
                "budget.rule ranked and budget.per_head are for inference"
            )
        for ratio in (*self.keep_ratio, *self.eval_ratios):
            self.d2o_at(ratio)
        if not self.eval_ratios and self.eval_every is not None:
            raise ValueError(f"eval_ratios is empty, but eval_every is {self.eval_every}: name a ratio to measure at")
        if self.objective == "d2o_distill" and self.distill.teacher == "base" and self.lora is None:
            raise ValueError('distill.teacher ("base") is the model without its LoRA weights: lora is null')

    def _check_sharding(self) -> None:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size})"
            )
        for name, length in (("sequence_length", self.sequence_length), ("context_length", self.context_length)):
            if length is not None and length % self.sp:
                raise ValueError(f"{name} ({length}) must be divisible by sp ({self.sp})")

    # ---- what follows from the fields --------------------------------------------------------------------------

    def d2o_at(self, keep_ratio: float) -> D2OConfig:
        """How contexts are compressed at one ratio."""
        return self.d2o.replace(keep_ratio=keep_ratio, keep_tokens=None)

    def micro_steps(self, dp: int) -> int:
        """Forwards of a step on each of `dp` replicas.

        Raises:
            ValueError: the rows of a step do not divide.
        """
        if self.global_batch_size % (self.micro_batch_size * dp):
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}) x dp ({dp})"
            )
        return self.global_batch_size // (self.micro_batch_size * dp)

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From nested mappings; unknown keys are refused at every level."""
        if not isinstance(values, Mapping):
            raise ValueError(f"TrainConfig must be given as a mapping of fields, not {type(values).__name__}")
        values = dict(values)
        refuse_unknown(values, [f.name for f in dataclasses.fields(cls)], cls.__name__)
        for name, why in (("model", "name a folder or a hub model"), ("data", "name the documents"),
                          ("output", "name a folder")):  # fmt: skip
            if values.get(name) is None:
                raise ValueError(f"{name} is missing: {why}")
        if not isinstance(values.get("d2o"), D2OConfig):
            values["d2o"] = D2OConfig.from_dict({} if values.get("d2o") is None else values["d2o"])
        for name, part in _PARTS.items():
            given = values.get(name)
            if given is None and name != "data":
                values.pop(name, None)
            elif not isinstance(given, part):
                missing = name == "data" and isinstance(given, Mapping) and "train" not in given
                if missing:
                    raise ValueError("data.train is missing: name a file, a folder or a hub dataset")
                values[name] = build(part, given)
        return build(cls, values)

    @classmethod
    def load(cls, path: str | Path | None, overrides: Iterable[tuple[str, Any]] = ()) -> TrainConfig:
        """From a YAML file (or nothing) and `(dotted key, value)` pairs that take precedence.

        Raises:
            ValueError: an unknown key, or a value outside its limits.
        """
        return cls.from_dict(apply_overrides({} if path is None else load_yaml(path), list(overrides)))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values; `from_dict` is its inverse."""
        values = plain(self) | {"d2o": self.d2o.to_dict(), "eval_tasks": [task_to_dict(t) for t in self.eval_tasks]}
        parts = {name: getattr(self, name) for name in _PARTS}
        return values | {name: None if part is None else plain(part) for name, part in parts.items()}


def _ratios(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} ({shown(value)}) must be a list of ratios")
    for ratio in value:
        check_number(name, ratio)
        if not 0 < ratio <= 1:
            raise ValueError(f"{name} has {ratio}, which must be in (0, 1]")
    return tuple(float(ratio) for ratio in value)
