"""The parts of a `TrainConfig`: data, optimizer, engine, LoRA."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d2o_dist.fields.checks import check_int, check_number, check_strings, take_path
from d2o_dist.fields.io import check_choice, to_json
from d2o_dist.fields.show import shown

KINDS = ("auto", "text", "chat")
ENGINES = ("torch", "deepspeed")
OFFLOADS = ("none", "cpu")
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@dataclass(frozen=True)
class DataConfig:
    """Documents to train on and to measure on, read by `datasets`.

    Attributes:
        train: a `.txt` file (one document) or a folder of them, a `.jsonl`, `.json` or `.parquet` file (a row is a
            document), a folder made by `save_to_disk`, or the name of a hub dataset.
        validation: the same for held-out documents; null: nothing is measured.
        kind: `text`, `chat` (loss on answers only), or `auto`: `chat` where rows have `messages_field`.
        text_field, messages_field: where a row keeps its text or its messages (`role`, `content`).
        subset, train_split, validation_split: of a hub dataset.
        num_workers: processes that tokenize; null: this one.
        max_validation_rows: rows measured at most.
    """

    train: str
    validation: str | None = None
    kind: str = "auto"
    text_field: str = "text"
    messages_field: str = "messages"
    subset: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    num_workers: int | None = None
    max_validation_rows: int = 64

    def __post_init__(self) -> None:
        for name in ("train", "text_field", "messages_field", "train_split", "validation_split"):
            take_path(self, name, called=f"data.{name}")
        for name in ("validation", "subset"):
            take_path(self, name, called=f"data.{name}", optional=True)
        check_choice("data.kind", self.kind, KINDS)
        if self.num_workers is not None:
            check_int("data.num_workers", self.num_workers, low=1)
        check_int("data.max_validation_rows", self.max_validation_rows, low=1)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay.

    Attributes:
        lr: the highest learning rate.
        min_lr_ratio: the last one, over the highest.
        warmup_steps: steps over which it rises from 0.
        betas, eps: of AdamW.
        weight_decay: of weight matrices; biases and norms have none.
        max_grad_norm: gradients are scaled down to this norm; null: never.
    """

    lr: float = 1e-5
    min_lr_ratio: float = 0.1
    warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr_ratio", "eps", "weight_decay"):
            object.__setattr__(self, name, _as_number(getattr(self, name)))
            check_number(f"optimizer.{name}", getattr(self, name))
        check_int("optimizer.warmup_steps", self.warmup_steps, low=0)
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2:
            raise ValueError(f"optimizer.betas ({shown(self.betas)}) must be two numbers")
        object.__setattr__(self, "betas", tuple(self.betas))
        for value in self.betas:
            check_number("optimizer.betas", value)
        if self.max_grad_norm is not None:
            check_number("optimizer.max_grad_norm", self.max_grad_norm)
        limits = [
            ("lr", self.lr > 0, "above 0"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "in [0, 1]"),
            ("betas", all(0 <= value < 1 for value in self.betas), "in [0, 1)"),
            ("eps", self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "above 0, or null"),
        ]
        for name, holds, limit in limits:
            if not holds:
                raise ValueError(f"optimizer.{name} ({getattr(self, name)}) must be {limit}")


@dataclass(frozen=True)
class EngineConfig:
    """Who holds weights, gradients and optimizer states, and adds gradients up over ranks.

    Attributes:
        name: `torch`: every rank holds all of them (the reference, and enough for one device); `deepspeed`.
        zero_stage: what DeepSpeed shards over all ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too.
        offload_optimizer, offload_parameters: `cpu` keeps them in host memory (stages 1 to 3; parameters: 3).
        deepspeed: further entries of DeepSpeed's own configuration; they take precedence.
    """

    name: str = "torch"
    zero_stage: int = 0
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    deepspeed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("engine.name", self.name, ENGINES)
        check_int("engine.zero_stage", self.zero_stage, low=0, high=3)
        check_choice("engine.offload_optimizer", self.offload_optimizer, OFFLOADS)
        check_choice("engine.offload_parameters", self.offload_parameters, OFFLOADS)
        if not isinstance(self.deepspeed, Mapping):
            raise ValueError(f"engine.deepspeed ({shown(self.deepspeed)}) must be a mapping")
        try:
            to_json(dict(self.deepspeed))
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"engine.deepspeed ({shown(self.deepspeed)}) must be what JSON can say") from error
        if self.name == "torch" and (self.zero_stage or self.deepspeed):
            raise ValueError(
                f'engine.zero_stage ({self.zero_stage}) and engine.deepspeed need engine.name "deepspeed", not "torch"'
            )
        for name, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(self, name) != "none" and self.zero_stage < least:
                raise ValueError(f"engine.{name} (cpu) needs engine.zero_stage {least} at least, not {self.zero_stage}")


@dataclass(frozen=True)
class LoraOptions:
    """LoRA through `peft`: the model stays as it is, and low-rank additions to some of its matrices are trained.

    Attributes:
        rank: of the additions; alpha: they are scaled by alpha / rank; dropout: of their inputs.
        targets: names of the linear layers.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        check_int("lora.rank", self.rank, low=1)
        check_number("lora.alpha", self.alpha)
        check_number("lora.dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout ({self.dropout}) must be in [0, 1)")
        object.__setattr__(self, "targets", check_strings("lora.targets", self.targets))
        if not self.targets:
            raise ValueError("lora.targets must name at least one layer")


def _as_number(value: Any) -> Any:
    """A number that YAML 1.1 reads as a string, `1e-5` among them, as the number; anything else as it is."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def plain(part: Any) -> dict[str, Any]:
    """All fields of a part as plain Python values."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in ((f.name, getattr(part, f.name)) for f in dataclasses.fields(part))
    }
