"""What is tried: good configurations and rows of which a few places hold something else."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from d2o_dist.config.eval_tasks import TASK_CONFIGS
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.train import TrainConfig
from d2o_dist.policy.presets import PRESETS

Path = tuple[Any, ...]


def nested(depth: int, inner: Any = 0, *, key: str | None = None) -> Any:
    """Lists, or mappings of `key`, one in the other."""
    for _ in range(depth):
        inner = [inner] if key is None else {key: inner}
    return inner


LONG = "long " * 500
# What YAML and JSON can say.
TEXTUAL = [
    None, True, False, 0, 1, -1, 2, 64, 0.5, 1.0, 1.5, -0.0, 10**400, -(10**400), 2**63, 10**9, 1e308, 5e-324,
    float("nan"), float("inf"), "", " ", "x", "auto", "full", "all", "1e-5", "0.5", "\ud800", "\x00", LONG, [], {},
    [[]], [{}], [None], [0.5], [1, "x"], ["\udfff"], {"rule": "x"}, {"rule": []}, {"name": "full", "preset": "full"},
    {"x": 1}, {LONG: 1}, {"kind": "needle", "lengths": [10**9], "depths": 10**9, "samples": 10**9, "name": "n"},
    [LONG] * 9, list(range(400)), nested(3000), nested(3000, key="rule"), nested(40),
]  # fmt: skip
# What only a caller in Python can.
PYTHON = [
    torch.tensor(0.2), torch.tensor([1, 2]), torch.zeros(300, 300), np.array(["d2o", "full"]), np.arange(3.0),
    np.float64(0.5), np.int64(3), torch.float32, object(), b"bytes", {1, 2}, {1: 2, None: 3}, {(1, 2): 3}, int,
    (0.5, 0.5), datetime.date(2026, 1, 1), 3 + 4j, 10**5000,
]  # fmt: skip
TASKS = [
    {"kind": "needle", "lengths": [128], "depths": 3}, {"kind": "ruler", "lengths": [128], "tasks": ["vt"]},
    {"kind": "longbench", "data": "d", "tasks": ["trec"]}, {"kind": "jsonl", "data": "d", "question": "{q}"},
    {"kind": "perplexity", "lengths": [64]}, {"kind": "fidelity", "lengths": [64], "continuation": "decode"},
]  # fmt: skip


def _good() -> list[tuple[type, dict[str, Any]]]:
    assert {task["kind"] for task in TASKS} == set(TASK_CONFIGS)
    infer = [{"model": "m", "prompt": "p", "d2o": {"preset": name}} for name in PRESETS]
    infer.append({"model": "m", "parallel": {"sp": 2, "merge_scope": "local"}, "sampling": {"stop": ["a"]}})
    rows = {"model": "m", "output": "o", "tasks": TASKS, "keep_ratios": [0.5], "keep_tokens": [512]}
    train = {"model": "m", "output": "o", "data": {"train": "t"}, "sequence_length": 64, "lora": {"rank": 2}}
    distill = {**train, "objective": "d2o_distill", "context_length": 32, "eval_every": 1, "eval_tasks": TASKS[:1]}
    found = [(InferConfig, values) for values in infer]
    found += [(EvalConfig, rows), (TrainConfig, train), (TrainConfig, distill)]
    # Everything that can be said, said.
    return [(kind, values) for kind, given in found for values in (given, kind.from_dict(given).to_dict())]


GOOD = _good()


@dataclass(frozen=True)
class Given:
    """A configuration to try, and the names of the places that were changed in it."""

    kind: type
    values: dict[str, Any]
    changed: tuple[str, ...]


def places(values: Any, path: Path = ()) -> Iterator[Path]:
    """Of everything in nested mappings and lists."""
    parts = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in parts:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(values: Any, path: Path) -> Any:
    """What is at a place."""
    for key in path:
        values = values[key]
    return values


PLACES = [list(places(values)) for _, values in GOOD]
# What good ones have under a name: mixed, they are often good again.
KNOWN: dict[Any, list[Any]] = {}
for (_, _values), _paths in zip(GOOD, PLACES, strict=True):
    for _path in _paths:
        KNOWN.setdefault(_path[-1], []).append(at(_values, _path))
_numbers = st.integers() | st.floats() | st.integers(-2, 600)
_odd = st.sampled_from(TEXTUAL) | _numbers | st.text(max_size=8) | st.lists(_numbers, max_size=3)


def put(values: Any, path: Path, value: Any) -> None:
    """Replace what is at a place, if its surroundings are still there."""
    for key in path[:-1]:
        if key not in _keys(values):
            return
        values = values[key]
    if isinstance(values, dict) or path[-1] in _keys(values):
        values[path[-1]] = _copy(value)


def _copy(value: Any) -> Any:
    """A copy, that what is put into it later stays out of the others; of what is too deep, its first level."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return copy.copy(value)


def _keys(values: Any) -> Any:
    return values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()


@st.composite
def configurations(draw: Any) -> Given:
    """One of the good ones with one to three places changed, or a field that there is not."""
    number = draw(st.integers(0, len(GOOD) - 1))
    kind, good = GOOD[number]
    values, changed = copy.deepcopy(good), []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(PLACES[number]))
        if draw(st.integers(0, 9)) == 0:
            path = (*path[:-1], draw(st.text(max_size=12) | st.sampled_from([LONG, 7, None, "keep_ration"])))
        known = draw(st.booleans()) and path[-1] in KNOWN
        # A copy of what is known: a later change is not to change what others draw.
        drawn = draw(st.sampled_from(KNOWN[path[-1]]).map(copy.deepcopy) if known else _odd | st.sampled_from(PYTHON))
        put(values, path, drawn)
        changed += [key for key in path if isinstance(key, str)]
    return Given(kind, values, tuple(changed))


@st.composite
def overrides(draw: Any) -> tuple[type, dict[str, Any], list[str]]:
    """One of the good ones, and one to three texts `key=value` for it."""
    number = draw(st.integers(0, len(GOOD) - 1))
    kind, good = GOOD[number]
    texts = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(PLACES[number]))
        key = ".".join(str(part) for part in path)
        known = st.sampled_from(KNOWN[path[-1]]).map(_json)
        value = draw(known if draw(st.booleans()) else st.sampled_from(YAML) | st.text(alphabet=ALPHABET, max_size=12))
        texts.append(f"{key}={value}")
    return kind, good, texts


def _json(value: Any) -> str:
    """JSON, which YAML can read too."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 3000 + "]" * 3000


YAML = [_json(value) for value in TEXTUAL] + [
    "[" * 3000, "{a: " * 3000, "&a [*a]", "9" * 5000, "!!timestamp x", "!!bool x", "!!int x", "!!float x", "!!binary x",
    "2001-99-99", "1:99:99", "0b", "0x", "{a: 1, a: 2}", "{<<: {a: 1}}", "{<<: 3}", "{[1]: 2}",
    "!!python/object:os.system x", "\"\\ud800\"", "*a", "&a",
    "{? }", "? a", "1e-5", "[0.1, 0.2]", "null", "~", "1" + ":59" * 300 + ".0",
]  # fmt: skip

ALPHABET = "[]{}:,-&*!|>'\"#%@ \n\t0123456789._eExabnull~<"

ROW = {
    "id": "a", "prompt": "say", "messages": [{"role": "user", "content": "say"}], "max_new_tokens": 3,
    "max_prompt_tokens": 90, "stop": ["x"],
}  # fmt: skip
ROW_PLACES = list(places(ROW))


@st.composite
def rows(draw: Any) -> bytes:
    """A line of a prompts file: a row with a few places changed, or one that is no JSON."""
    values = copy.deepcopy(ROW)
    del values[draw(st.sampled_from(["prompt", "messages"]))]
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from([*ROW_PLACES, ("max_new_token",), ("other",), (LONG,)]))
        if draw(st.booleans()):
            put(values, path, draw(_odd))
    shape = draw(st.integers(0, 9))
    try:
        line = json.dumps(values if shape else draw(_odd)).encode()
    except RecursionError:
        line = b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}"
    if shape == 1:  # a byte that is not what it was
        at = draw(st.integers(0, len(line) - 1))
        line = line[:at] + bytes([draw(st.integers(0, 255))]) + line[at + 1 :]
    return line.replace(b"\n", b"")
