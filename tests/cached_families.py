"""What a `D2OCache` does with every causal and image-text model type of transformers, as a tiny random model.

`python -m tests.cached_families [TYPE ...]` prints a line for each type. Without names all of them are tried, in some
ten minutes, and compared with `tests/cached_families.json`: the command fails where one is worse than recorded there.
`--record` writes what was found into that file, and the tables of docs/models.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import traceback
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.gemma3n import modeling_gemma3n

import d2o_dist
from d2o_dist import D2OCache, D2OConfig
from tests.families import TOLERANCE, VARIANTS, VOCABULARY, Outcome, build, said, tiny_config
from tests.most_used import MOST_USED
from tests.tiny_types import CHANGES, QUERIES, WITH_IMAGES, WITH_TYPES, class_of

RECORD = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
MODEL_TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
# Best first. `late`: refused in a forward, after the weights were loaded; `failed`: an error that is not ours.
KINDS = ("compressed", "refused", "no reference", "late", "failed", "wrong")
LENGTH, PADDED, STEPS, LIMIT = 36, 9, 5, 60


@torch.no_grad()
def generated(model: Any, **given: Any) -> Tensor:
    """Logits of greedily chosen tokens after two prompts, the first padded on the left: [2, STEPS, vocabulary]."""
    ids = torch.randint(5, VOCABULARY - 20, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, :PADDED] = mask[0, :PADDED] = 0
    if model.config.model_type in WITH_TYPES:
        given["token_type_ids"] = torch.zeros_like(ids)
    given |= image_of(model, ids)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS,
                            do_sample=False, output_logits=True, return_dict_in_generate=True, **given)  # fmt: skip
    return torch.stack(output.logits, 1).double()


def image_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a type of `WITH_IMAGES` reads of an image, or of a film of four, whose tokens are put into ids [2, T]."""
    kind = model.config.model_type
    names = WITH_IMAGES.get(kind, ())
    if not names:
        return {}
    frames = {"idefics": (1,), "instructblipvideo": (4,)}.get(kind, ())
    count = QUERIES["num_query_tokens"] * math.prod(frames)
    if kind != "idefics":  # it has layers that attend to images
        ids[:, PADDED + 2 : PADDED + 2 + count] = 96 if kind == "instructblipvideo" else 97
    pixels = torch.randn(2, *frames, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = {
        "pixel_values": pixels.to(model.dtype), "qformer_input_ids": ids.clamp(max=VOCABULARY - 20),
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long)
    }  # fmt: skip
    return {name: made[name] for name in names}


def is_own(error: Exception) -> bool:
    """Whether the library raised it for its user: no error of others, and no `assert`."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and Path(d2o_dist.__file__).parent in Path(last).parents


@dataclass(frozen=True)
class Reference:
    """Logits without a `D2OCache`, and how they were made."""

    logits: Tensor
    attention: str
    dtype: torch.dtype

    def agrees(self, found: Tensor) -> bool:
        """Within what float32, in which `generate` hands logits out, and this attention allow."""
        tolerance = max(TOLERANCE[self.attention, self.dtype], 1e-6) * max(float(self.logits.abs().max()), 1.0)
        return bool(((found - self.logits).abs() <= tolerance).all())


def reference_of(model_class: Any, config: Any) -> Reference:
    """Of the first attention and dtype that this model has, with the cache that it has, if any.

    Raises:
        whatever the first of them raises, where there is none.
    """
    first: Exception | None = None
    for dtype, attention, use_cache in itertools.product(
        (torch.float64, torch.float32), ("sdpa", "eager"), (True, False)
    ):
        try:
            logits = generated(build(model_class, config, attention, dtype), use_cache=use_cache)
            if not logits.isfinite().all() or not logits.any():
                raise RuntimeError("logits are not finite, or all zero")
            return Reference(logits, attention, dtype)
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises
            first = first or error
    raise first


def refused(model_class: Any, config: Any) -> Outcome | None:
    """Whether a cache is refused for the configuration that such a model gets; None: it is not."""
    config = type(config).from_dict(config.to_dict())
    try:
        with torch.device("meta"):
            config = model_class(config).config
    except Exception:  # noqa: BLE001 - then it is the reference that says why
        pass
    config._attn_implementation = "d2o"
    try:
        D2OCache(config=config)
    except Exception as error:  # noqa: BLE001
        return Outcome("refused" if is_own(error) else "failed", said(error))
    return None


def serve(model_class: Any, config: Any, expected: Reference) -> Outcome:
    """What becomes of this model with a `D2OCache`: all tokens kept, then 30% of them."""
    try:
        try:
            model = build(model_class, config, "d2o", expected.dtype)
        except KeyError:  # some vision towers know no attention but their own
            model = build(model_class, config, {"text_config": "d2o"}, expected.dtype)
        full = D2OCache(config=model.config, d2o=D2OConfig(keep_ratio=1.0))
        part = D2OCache(config=model.config, d2o=D2OConfig(keep_ratio=0.3, budget={"min_layer_tokens": 1}))
        if not expected.agrees(generated(model, past_key_values=full)):
            return Outcome("wrong", "logits differ with all tokens kept")
        if not generated(model, past_key_values=part).isfinite().all():
            return Outcome("wrong", "logits are not finite with 30% kept")
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001
        return Outcome("late" if is_own(error) else "failed", said(error))
    held = [cache.report().achieved_keep_ratio or 0 for cache in (full, part)]
    if held[0] != 1 or not 0.2 < held[1] < 0.4:
        return Outcome("wrong", f"{held} are held of 1.0 and 0.3")
    return Outcome("compressed", f"exact as {expected.attention}")


class NoTower:
    """In place of `AutoModel` where a model makes its parts: of a vision tower that is timm's, which no text needs."""

    @staticmethod
    def from_config(config: Any) -> nn.Module:
        is_tower = config.model_type == "gemma3n_vision"
        return nn.Identity() if is_tower else transformers.AutoModel.from_config(config)


@patch.object(modeling_gemma3n, "AutoModel", NoTower)
def outcome_of(model_type: str) -> Outcome:
    """Of the first variant that a cache is refused for, or that a reference runs."""
    kind, model_class, first = CONFIG_MAPPING[model_type], class_of(model_type), None
    for leave, changes in VARIANTS:
        try:
            config = tiny_config(kind, {"is_decoder": True, **changes, **CHANGES.get(model_type, {})}, leave)
            if (outcome := refused(model_class, config)) is not None:
                return outcome
            expected = reference_of(model_class, config)
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001
            first = first or error
            continue
        return serve(model_class, config, expected)
    try:  # of types that cannot be made small the defaults may tell
        return refused(model_class, kind()) or Outcome("no reference", said(first))
    except Exception as error:  # noqa: BLE001
        return Outcome("no reference", said(error))


def sweep(model_types: Collection[str]) -> dict[str, Outcome]:
    """Outcomes by type, a line for each as it is known; a type is given up after `LIMIT` seconds of one core."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {LIMIT} s")

    signal.signal(signal.SIGVTALRM, give_up)
    outcomes = {}
    for model_type in model_types:
        signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
        try:
            outcomes[model_type] = outcome_of(model_type)
        except TimeoutError as error:
            outcomes[model_type] = Outcome("no reference", str(error))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(f"{model_type:24} {outcomes[model_type]}", flush=True)
    return outcomes


def worse(outcomes: Mapping[str, Outcome], recorded: Mapping[str, Any]) -> list[str]:
    """A line for each type whose kind comes after the recorded one in `KINDS`; a new type must not be worse than
    "no reference"."""
    lines = []
    for model_type, outcome in outcomes.items():
        before = recorded.get(model_type, {"kind": "no reference"})["kind"]
        if KINDS.index(outcome.kind) > KINDS.index(before):
            lines.append(f"{model_type} was {before}, and is {outcome}")
    return lines


def cause_of(one: Mapping[str, Any]) -> str:
    """The kind of a recorded type, or, of one that is refused, what it has."""
    if one["kind"] != "refused":
        return one["kind"]
    return one["why"].split(" has ", 1)[-1].split(", which", 1)[0].split(" (", 1)[0]


def most_used(types: Mapping[str, Any]) -> list[str]:
    """Which of the families that people run most are served whole, and a line for each of the others."""
    whole, lines = [], []
    for family, names in MOST_USED.items():
        others = [f"`{name}` ({cause_of(types[name])})" for name in names if types[name]["kind"] != "compressed"]
        whole += [] if others else [family]
        lines += [f"- {family}: {', '.join(others)}"] if others else []
    said = (
        f"**Most used in 2025-26, in our judgement** (`tests/most_used.py`): all types of {len(whole)} of the "
        f"{len(MOST_USED)} families are exact and compressed: {', '.join(whole)}."
    )
    return [f"{said} The others:", "", *lines] if lines else [said]


def tables(recorded: Mapping[str, Any]) -> str:
    """The part of docs/models.md that is made of the record."""
    groups: dict[str, list[str]] = {}
    for model_type, one in recorded["types"].items():
        groups.setdefault(cause_of(one), []).append(f"`{model_type}`")
    served, untried = groups.pop("compressed"), groups.pop("no reference", [])
    rows = sorted(groups.items(), key=lambda item: -len(item[1]))
    return "\n".join([
        f"Made by `python -m tests.cached_families --record` with transformers {recorded['transformers']}, of "
        f"{len(recorded['types'])} types of causal and image-text models. Text alone was read; "
        f"{', '.join(f'`{name}`' for name in WITH_IMAGES)} read an image with it.",
        "",
        f"**Exact with all tokens kept, and compressed to 30%** ({len(served)}): {', '.join(served)}.",
        "",
        *most_used(recorded["types"]),
        "",
        "| refused when the cache is made: the model has | types |",
        "|---|---|",
        *(f"| {cause} | {', '.join(names)} |" for cause, names in rows),
        *(["", "| not tried | why |", "|---|---|"] if untried else []),
        *(f"| {name} | {recorded['types'][name.strip('`')]['why']} |" for name in untried),
    ])  # fmt: skip


def write(known: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """The record, of what was `known` and these outcomes, and the tables made of it."""
    types = {**known, **{name: {"kind": one.kind, "why": one.why} for name, one in outcomes.items()}}
    recorded = {"transformers": transformers.__version__, "types": dict(sorted(types.items()))}
    RECORD.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(recorded)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> int:
    """Exit status 1 where a type is worse than recorded."""
    parser = argparse.ArgumentParser(prog="python -m tests.cached_families", description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--record", action="store_true", help="write what was found into the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    outcomes = sweep(arguments.types or MODEL_TYPES)
    print(dict(Counter(outcome.kind for outcome in outcomes.values())))
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["types"]
    if arguments.record:
        write(recorded if arguments.types else {}, outcomes)
        return 0
    lines = worse(outcomes, recorded)
    print(*lines, sep="\n")
    return bool(lines)


if __name__ == "__main__":
    raise SystemExit(main())
