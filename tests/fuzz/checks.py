"""What must hold of everything that is tried: a short `ValueError` that names a field, or what was asked for."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from d2o_dist.config.distill import DistillConfig
from d2o_dist.config.eval_tasks import TASK_CONFIGS
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.config.train import TrainConfig
from d2o_dist.config.train_parts import DataConfig, EngineConfig, LoraOptions, OptimizerConfig
from d2o_dist.engine.encode import BadRow, Request, encode_row
from d2o_dist.engine.prompts import parse_row
from d2o_dist.engine.records import error_record, to_line
from d2o_dist.fields.overrides import apply_overrides, parse_override
from d2o_dist.models.shape import ModelShape
from d2o_dist.policy.config import PARTS, D2OConfig
from d2o_dist.policy.statistics import StatisticsConfig
from tests.engine.tiny import make_tokenizer
from tests.fuzz.given import Given

MOST_CHARACTERS = 1000
CLASSES = (
    InferConfig, EvalConfig, TrainConfig, D2OConfig, StatisticsConfig, ParallelConfig, SamplingConfig, DataConfig,
    OptimizerConfig, EngineConfig, LoraOptions, DistillConfig, *TASK_CONFIGS.values(),
    *(rule for rules in PARTS.values() for rule in rules.values()),
)  # fmt: skip
FIELDS = {field.name for kind in CLASSES for field in dataclasses.fields(kind)} | {kind.__name__ for kind in CLASSES}
NAMED = re.compile(rf"\b({'|'.join(sorted(FIELDS, key=len, reverse=True))})\b")
SPELLED = {"preset", "rule", "kind"}  # of YAML, and of no class
seen: Counter[str] = Counter()


def check_error(error: ValueError, changed: tuple[str, ...]) -> None:
    """It is short, and names a place that was changed, or a field beside its value."""
    text = str(error)
    assert len(text) <= MOST_CHARACTERS, f"{len(text)} characters: {text[:300]}"
    named = any(key[:20] in text for key in changed if key) or NAMED.search(text)
    assert named, f"names no field: {text}"


def check_config(given: Given) -> None:
    """Refused as it should be, or taken as it was given."""
    try:
        config = given.kind.from_dict(given.values)
    except ValueError as error:
        seen["configurations refused"] += 1
        return check_error(error, given.changed)
    seen["configurations taken"] += 1
    answer = config.to_dict()
    assert given.kind.from_dict(answer) == config
    check_answer(given.values, answer, "")


def check_overrides(kind: type, good: Mapping[str, Any], texts: list[str]) -> None:
    """The same, of what is said on a command line."""
    try:
        pairs = [parse_override(text) for text in texts]
        values = apply_overrides(good, pairs)
        config = kind.load(None, [*good.items(), *pairs])
    except ValueError as error:
        seen["overrides refused"] += 1
        return check_error(error, tuple(part for text in texts for part in text.partition("=")[0].split(".")))
    seen["overrides taken"] += 1
    check_answer(values, config.to_dict(), "")


def check_answer(given: Any, answer: Any, where: str) -> None:
    """Nothing that was given is taken for something else; null is the default."""
    if given is None or (given == "all" and isinstance(answer, list)):
        return
    if isinstance(given, Mapping):
        assert isinstance(answer, Mapping), f"{where}: {answer!r:.200} for a mapping"
        for key, value in given.items():
            if key != "preset" or "preset" in answer:
                check_answer(value, answer[key], f"{where}.{key}")
    elif isinstance(answer, Mapping):
        assert given in (answer.get("rule"), answer.get("name")), f"{where}: {answer!r:.200} for {given!r:.200}"
    elif isinstance(given, (list, tuple)) and isinstance(answer, list):
        if len(given) == len(answer):
            for value, one in zip(given, answer, strict=True):
                check_answer(value, one, f"{where}[]")
            return
        for value in given:  # said twice is said once
            assert any(_agrees(value, one) for one in answer), f"{where}: {answer!r:.200} lacks {value!r:.200}"
    elif isinstance(answer, list):
        count = where.endswith(".depths") and given == len(answer)
        assert count or (len(answer) == 1 and _agrees(given, answer[0])), f"{where}: {answer!r:.200} for {given!r:.200}"
    else:
        assert _agrees(given, answer), f"{where}: {answer!r:.200} for {given!r:.200}"


def _agrees(given: Any, answer: Any) -> bool:
    if isinstance(given, Mapping) or isinstance(answer, Mapping):
        check_answer(given, answer, "in a list")
        return True
    if isinstance(given, str) and isinstance(answer, float):
        return float(given) == answer
    if isinstance(given, bool) or isinstance(answer, bool) or isinstance(given, str):
        return type(given) is type(answer) and given == answer
    return math.isclose(given, answer, rel_tol=0, abs_tol=1e-6)  # depths have six digits


_TOKENIZER = make_tokenizer()
_CONFIG = InferConfig(model="m")
_SHAPE = ModelShape((None,), 1, 1, 8, vocab_size=len(_TOKENIZER), max_positions=200)


def check_row(line: bytes) -> None:
    """One row in, one out: the row as it was written, or an error that is short and can be written down."""
    row = parse_row(0, line, 1)
    found = encode_row(row, _TOKENIZER, _CONFIG, _SHAPE)
    if isinstance(found, BadRow):
        seen["rows refused"] += 1
        assert found.error.strip() and len(found.error) <= MOST_CHARACTERS, f"{len(found.error)}: {found.error[:300]}"
        assert json.loads(to_line(error_record(found)))["error"] == found.error
        return
    seen["rows taken"] += 1
    values = json.loads(line)
    assert isinstance(found, Request) and row.id == (0 if values.get("id") is None else values["id"])
    assert row.prompt == values.get("prompt")
    if row.messages is not None:
        given = [{key: message[key] for key in ("role", "content")} for message in values["messages"]]
        assert list(row.messages) == given
    for name in ("max_new_tokens", "max_prompt_tokens", "stop"):
        check_answer(values.get(name), _plain(getattr(row, name)), name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
