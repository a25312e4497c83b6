"""`D2OConfig`: how a KV cache is compressed. A size, and a policy of three rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from d2o_dist.fields.checks import is_number
from d2o_dist.fields.declare import integer, real
from d2o_dist.fields.io import build, did_you_mean, dump_yaml, load_yaml, refuse_unknown
from d2o_dist.fields.show import named, shown
from d2o_dist.policy.budget import BUDGETS, BudgetRule, Dispersion, Size, floor_tokens
from d2o_dist.policy.merge import MERGES, Mass, MergeRule
from d2o_dist.policy.presets import PRESETS
from d2o_dist.policy.rule import check_fields, part, plain, rule_from
from d2o_dist.policy.score import SCORES, Reach, ScoreRule
from d2o_dist.policy.statistics import COLUMN_SUMS, PEAKS, RATES, QuerySample, StatisticsConfig
from d2o_dist.policy.storage import FORMATS, Exact, StorageFormat

# The two ways to say how much is kept.
SIZES = ("keep_ratio", "keep_tokens")
# The parts of a policy, and the rules that each may be.
PARTS: dict[str, dict[str, type]] = {"score": SCORES, "budget": BUDGETS, "merge": MERGES, "storage": FORMATS}

DEFAULT_KEEP_RATIO = 0.2


@dataclass(frozen=True)
class D2OConfig:
    """How a KV cache is compressed. The defaults are the preset `d2o`; see `docs/algorithm.md` for the equations.

    Size of the cache (exactly one of the first two; `keep_ratio=0.2` when neither is given):

    Attributes:
        keep_ratio: fraction of the full cache's tokens to keep, averaged over the compressed layers, in (0, 1].
        keep_tokens: slots a layer, on average; does not depend on the length of the prompt.
        num_sink_tokens: first tokens of the sequence, never evicted, as far as there are slots for them.
        recent_fraction: share of a layer's slots for the newest tokens; the rest, sinks included, is chosen by score.
        eviction_interval: while decoding a layer is evicted when it holds this many slots more than its budget; None:
            never.
        score: what tokens rank by (`policy/score.py`).
        budget: how layers, or KV heads, share the total (`policy/budget.py`).
        merge: what becomes of evicted tokens (`policy/merge.py`).
        storage: how kept keys and values lie in memory while decoding (`policy/storage.py`).
        statistics: how the statistics of attention that those rules read are taken (`policy/statistics.py`).

    A part may be given as a rule, as a rule's name, or as a mapping of its fields: `score={"reach": 10.0}` changes a
    field of the default's rule, `score={"rule": "window", "pool": 9}` chooses another one.

    Raises:
        ValueError: an unknown rule or field, with the nearest known one, or a value outside its limits.
    """

    keep_ratio: float | None = real(None, above=0, high=1, optional=True)
    keep_tokens: int | None = integer(None, low=1, optional=True)
    num_sink_tokens: int = integer(4, low=0)
    recent_fraction: float = real(0.2, above=0, below=1)
    eviction_interval: int | None = integer(16, low=1, optional=True)
    score: ScoreRule = part(Reach(), SCORES)
    budget: BudgetRule = part(Dispersion(), BUDGETS)
    merge: MergeRule = part(Mass(), MERGES)
    storage: StorageFormat = part(Exact(), FORMATS)
    statistics: StatisticsConfig = StatisticsConfig()

    def __post_init__(self) -> None:
        if self.keep_ratio is None and self.keep_tokens is None:
            object.__setattr__(self, "keep_ratio", DEFAULT_KEEP_RATIO)
        if not isinstance(self.statistics, StatisticsConfig):
            object.__setattr__(self, "statistics", _statistics(self.statistics, StatisticsConfig()))
        check_fields(self, "")
        if self.keep_ratio is not None and self.keep_tokens is not None:
            raise ValueError(
                f"keep_ratio ({self.keep_ratio}) and keep_tokens ({self.keep_tokens}) are two ways to say one thing: "
                "give exactly one"
            )
        self._check_parts()
        self._check_room()

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> D2OConfig:
        """A named configuration, with any field overridden; a mapping overrides fields of the preset's rule.

        Raises:
            ValueError: unknown preset or field, or a value outside its limits.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f'no preset "{named(name)}".{did_you_mean(name, PRESETS)} Known: {", ".join(PRESETS)}')
        _refuse_unknown(overrides)
        # None for a size means that it is not given.
        given = {key: value for key, value in overrides.items() if value is not None or key not in SIZES}
        ratio = given.get("keep_ratio", 1.0)
        if name == "full" and ("keep_tokens" in given or not (is_number(ratio) and ratio == 1.0)):
            raise ValueError('preset "full" keeps the whole cache: keep_ratio must be 1.0 and keep_tokens unset')
        return cls(**{**PRESETS[name], **_merged(given, PRESETS[name])})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> D2OConfig:
        """From a mapping of fields; the extra key `preset` names the preset that the fields override."""
        if not isinstance(values, Mapping):
            raise ValueError(f"d2o ({shown(values)}) must be a mapping of fields, not {type(values).__name__}")
        _refuse_unknown(key for key in values if key != "preset")
        values = dict(values)
        name = values.pop("preset", None)
        if name is None:
            return build(cls, values)
        if all(f.name in values for f in dataclasses.fields(cls)):
            raise ValueError(f'preset "{named(name)}" would change nothing: every field is given. Leave one out')
        return cls.preset(name, **values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values; `from_dict` is its inverse."""
        values = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {**values, "statistics": dataclasses.asdict(self.statistics)}

    @classmethod
    def from_yaml(cls, path: str | Path) -> D2OConfig:
        """From a YAML file of fields (and optionally `preset`)."""
        return cls.from_dict(load_yaml(path))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The YAML text of all fields; also written to `path` when given."""
        text = dump_yaml(self.to_dict())
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def replace(self, **changes: Any) -> D2OConfig:
        """A copy with some fields changed, validated anew; a mapping changes fields of a part."""
        _refuse_unknown(changes)
        return dataclasses.replace(self, **_merged(changes, vars(self)))

    # ---- what follows from the fields --------------------------------------------------------------------------

    @property
    def size(self) -> Size:
        """How much is kept."""
        return Size(self.keep_ratio, self.keep_tokens)

    def needs(self, statistic: str) -> bool:
        """Whether a rule reads a statistic of attention; if not, it is never measured."""
        return not self.keeps_everything and any(statistic in getattr(self, part).statistics for part in PARTS)

    def for_layers(self, num_layers: int, num_kv_heads: int) -> D2OConfig:
        """The configuration for a model of so many layers with full attention, each of so many KV heads: few may share
        by a simpler rule (`BudgetRule.for_layers`)."""
        rule = self.budget.for_layers(num_layers * (num_kv_heads if self.budget.per_head else 1))
        return self if rule is self.budget else self.replace(budget=rule)

    # Asked in every layer of every decode step.
    @cached_property
    def needs_column_sums(self) -> bool:
        """Whether a decision depends on whole-prompt attention statistics."""
        return self.needs(COLUMN_SUMS)

    @cached_property
    def needs_rates(self) -> bool:
        """Whether the attention of the last prompt queries, and its decaying average while decoding, are kept."""
        return self.needs(RATES)

    @cached_property
    def needs_reread(self) -> bool:
        """Whether tokens are ranked by a second reading of the prompt. `scores` then hold peaks rather than sums."""
        return self.needs(PEAKS)

    @property
    def by_layer(self) -> bool:
        """Whether layers are compressed as wholes, after one reading, by budgets that no ranking of tokens decides.

        That is all that training can do.
        """
        return not (self.needs_reread or self.budget.by_ranking or self.budget.per_head)

    @property
    def knows_budgets(self) -> bool:
        """Whether budgets follow from the number of tokens alone, so that they are known before a prompt is read."""
        return self.keeps_everything or self.budget.is_known_before

    @property
    def suits_layerwise(self) -> bool:
        """Whether a prompt can be compressed layer by layer, and what is left is as if it had been compressed at once:
        its budgets are known, or later trims hand on what was merged before."""
        possible = not (self.needs_reread or self.budget.by_ranking)
        return possible and (self.knows_budgets or self.merge.composes)

    def check_reading(self, reading: str) -> None:
        """Refuse a way to read prompts that these rules do not allow.

        Raises:
            ValueError: all layers of a prompt are needed at once, and it is not read `whole`; a `stream` whose budgets
                would grow, or follow from its beginning.
        """
        if reading == "stream" and (self.keep_tokens is None or not self.budget.is_known_before):
            raise ValueError(
                f"reading (stream) needs keep_tokens and equal or fixed shares, but keep_tokens is {self.keep_tokens} "
                f"and budget.rule is {self.budget.name}"
            )
        if reading in ("layerwise", "stream") and (self.needs_reread or self.budget.by_ranking):
            rule, why = self.budget, "compares the tokens of all layers"
            if self.needs_reread:
                rule, why = self.score, "reads the prompt a second time"
            raise ValueError(f"{rule.path}.rule ({rule.name}) {why}: it cannot be compressed layer by layer")

    @property
    def query_sample(self) -> QuerySample | None:
        """Which queries column sums are taken from; None: all, or there are none to take."""
        if not self.needs_column_sums:
            return None
        return self.statistics.query_sample(ranks_tokens=COLUMN_SUMS in self.score.statistics)

    @property
    def num_last_queries(self) -> int:
        """Last queries of a prompt that finalize looks at: for the rates, and those no sampled query stands for."""
        sample = self.query_sample
        return max(self.statistics.rate_window if self.needs_rates else 0, 0 if sample is None else sample.stride - 1)

    @property
    def keeps_everything(self) -> bool:
        """Whether no token is ever evicted."""
        return self.keep_ratio == 1.0 and self.eviction_interval is None

    def split(self, num_slots: int) -> tuple[int, int]:
        """`(num_heavy, num_recent)` of `num_slots` slots: `floor((1 - recent_fraction) * S)` and the rest."""
        num_heavy = floor_tokens((1 - self.recent_fraction) * num_slots)
        return num_heavy, num_slots - num_heavy

    # ---- validation --------------------------------------------------------------------------------------------

    def _check_parts(self) -> None:
        if self.budget.by_ranking and not self.score.statistics:
            raise ValueError(
                f"budget.rule ({self.budget.name}) compares the tokens of all layers by attention, and score.rule "
                f"({self.score.name}) reads none"
            )

    def _check_room(self) -> None:
        """Refuse a configuration whose layers could never hold `num_sink_tokens + 1` heavy and 1 recent token."""
        budget = self.budget
        if self.keep_ratio is not None and budget.exact_total and budget.min_layer_ratio > self.keep_ratio:
            raise ValueError(
                f"budget.min_layer_ratio ({budget.min_layer_ratio}) alone exceeds the total: keep_ratio is "
                f"{self.keep_ratio}"
            )
        if self.keep_tokens is None:
            return  # a prompt can be long enough for any ratio
        num_heavy, num_recent = self.split(max(self.keep_tokens, budget.min_layer_tokens))
        if num_heavy < self.num_sink_tokens + 1 or num_recent < 1:
            raise ValueError(
                f"keep_tokens ({self.keep_tokens}) gives a layer {num_heavy} heavy and {num_recent} recent slots; it "
                f"must hold at least num_sink_tokens + 1 = {self.num_sink_tokens + 1} heavy and 1 recent token"
            )


def _merged(given: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Given fields, with mappings of a part laid over the rule of `base`."""
    merged = dict(given)
    for name, rules in PARTS.items():
        if name in given:
            base_rule = base.get(name, D2OConfig.__dataclass_fields__[name].default)
            merged[name] = rule_from(given[name], rules, name, base=base_rule)
    if "statistics" in given:
        merged["statistics"] = _statistics(given["statistics"], base.get("statistics", StatisticsConfig()))
    return merged


def _statistics(value: Any, base: StatisticsConfig) -> StatisticsConfig:
    if isinstance(value, StatisticsConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"statistics ({shown(value)}) must be a mapping of fields")
    refuse_unknown(value, [field.name for field in dataclasses.fields(base)], "statistics")
    return dataclasses.replace(base, **value)


def _refuse_unknown(keys: Any) -> None:
    """Raise for a field that `D2OConfig` does not have; one that a part has is named with its part."""
    known = [field.name for field in dataclasses.fields(D2OConfig)]
    keys = list(keys)
    for key in keys:
        owners = [name for name, rules in PARTS.items() if any(key in rule.fields() for rule in rules.values())]
        if key not in known and owners:
            raise ValueError(f'{D2OConfig.__name__} has no field "{key}". Did you mean "{owners[0]}.{key}"?')
    refuse_unknown(keys, known, D2OConfig.__name__)
