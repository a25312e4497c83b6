"""The cache of the naive oracle: statistics, selection and eviction of one sequence, sections 3 to 5."""

from __future__ import annotations

import dataclasses
import math

import torch

from .naive_budgets import layer_log_weights, layer_slots, protected_set
from .naive_config import OracleConfig, floor
from .naive_sampling import OracleSampling
from .naive_slots import Eviction, Slot, merge_into, nearest_targets, snapshot
from .naive_softmax import OracleSoftmax

RATE_EPSILON = 1e-9  # section 4b: "plus 1e-9"
MIXED_MIN_AGE = 32  # section 3: "a / max(tokens seen - position, 32)"


class OracleCache(OracleSampling):
    def __init__(self, config: OracleConfig, num_layers: int, num_heads: int, num_kv_heads: int) -> None:
        self.config = config
        self.num_layers, self.num_heads, self.num_kv_heads = num_layers, num_heads, num_kv_heads
        self.group_size = num_heads // num_kv_heads
        heads = list(range(num_kv_heads))
        # What has a budget and a threshold: a layer with all of its KV heads, or one KV head of a layer.
        self.units = [(layer, part) for layer in range(num_layers)
                      for part in ([[head] for head in heads] if config.budget_per == "head" else [heads])]  # fmt: skip
        protected = protected_set(config, num_layers)
        self.protected = {unit for unit, (layer, _) in enumerate(self.units) if layer in protected}
        self.reread_done = self.has_sinks = False
        self.slots: list[list[list[Slot]]] = [[[] for _ in range(num_kv_heads)] for _ in range(num_layers)]
        self.thresholds: list[float | None] = [None] * len(self.units)
        self.budgets: list[tuple[int, int]] | None = None  # (N_l, M_l) of each unit
        self.ratios: list[float] | None = None
        self.log_weights: list[float] | None = None  # of the first prefill
        self.num_seen_tokens = 0  # "the number of tokens seen"
        self.pending = False  # tokens prefilled since the last finalize
        # Per layer, per query head, the column sums of the first prefill.
        self.column_sums: list[list[torch.Tensor]] = [
            [torch.zeros(0, dtype=torch.float64) for _ in range(num_heads)] for _ in range(num_layers)
        ]
        # Per layer, per KV head, the group's attention rows of this prefill's last `rate_window` queries.
        self.window: list[list[list[torch.Tensor]]] = [[[] for _ in range(num_kv_heads)] for _ in range(num_layers)]
        self._begin_sampling()
        self.evictions: list[Eviction] = []

    def num_live(self, unit: int) -> int:
        layer, heads = self.units[unit]
        return len(self.slots[layer][heads[0]])

    # -- attention ----------------------------------------------------------------------------------------------------

    def _append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: list[int]) -> None:
        for head in range(self.num_kv_heads):
            for i, position in enumerate(positions):
                # "Append (k_t, v_t) with position t, score 0."
                self.slots[layer][head].append(Slot(keys[head, i].clone(), values[head, i].clone(), position))

    def _attend(
        self, layer: int, queries: torch.Tensor, positions: list[int], softmax: OracleSoftmax
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Outputs [Hq, n, D] and, per query head, the probabilities [n, live slots]."""
        self.has_sinks = softmax.sinks is not None
        outputs, probabilities = [], []
        for head, slots in enumerate(self.slots[layer]):
            keys = torch.stack([s.key for s in slots])
            values = torch.stack([s.value for s in slots])
            log_mass = torch.tensor([s.log_mass for s in slots], dtype=torch.float64)
            later = torch.tensor([s.position for s in slots]) > torch.tensor(positions)[:, None]
            for h in self._group(head):
                p = softmax.probabilities(h, queries[h] @ keys.T, log_mass, later)
                outputs.append(p @ values)
                probabilities.append(p)
        return torch.stack(outputs), probabilities

    def _group(self, head: int) -> range:
        return range(head * self.group_size, (head + 1) * self.group_size)

    # -- prefill: sections 1 and 5 ------------------------------------------------------------------------------------

    def prefill_chunk(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax: OracleSoftmax
    ) -> torch.Tensor:
        """One layer of one chunk: of the first prefill (section 1), or of a later turn, whose "queries attend the live
        slots and each other, causally; every live slot's score grows by the column sums" (section 5)."""
        positions = list(range(self.num_seen_tokens, self.num_seen_tokens + queries.shape[1]))
        self._append(layer, keys, values, positions)
        outputs, probabilities = self._attend(layer, queries, positions, softmax)
        for h, attention in enumerate(probabilities):
            # "c[h,j] = sum_i A[h,i,j]".
            rows = list(attention)
            if self.config.score_queries == "strided":
                rows = self._sampled_rows(layer, h, rows)
            self._add_column_sums(layer, h, sum(rows, torch.zeros(attention.shape[1], dtype=torch.float64)))
        for head in range(self.num_kv_heads):
            group_probabilities = sum(probabilities[h] for h in self._group(head))
            if self.reread_done:
                self._raise_peaks(layer, head, group_probabilities)
            rows = self.window[layer][head] + list(group_probabilities)
            self.window[layer][head] = rows[-self.config.rate_window :]
        return outputs

    def _raise_peaks(self, layer: int, head: int, group_probabilities: torch.Tensor) -> None:
        """With `reread` a slot's score is the most that a query [n, S] gave it, from the second reading on."""
        for slot, peak in zip(self.slots[layer][head], group_probabilities.amax(dim=0).tolist(), strict=True):
            slot.score = max(slot.score, peak)

    def reread_chunk(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax: OracleSoftmax
    ) -> torch.Tensor:
        """One layer of one chunk of the second reading: appended, attended, scored, and taken away again."""
        count = len(self.slots[layer][0])
        positions = list(range(self.num_seen_tokens, self.num_seen_tokens + queries.shape[1]))
        self._append(layer, keys, values, positions)
        outputs, probabilities = self._attend(layer, queries, positions, softmax)
        self.reread_done = True
        for head in range(self.num_kv_heads):
            self._raise_peaks(layer, head, sum(probabilities[h] for h in self._group(head)))
            del self.slots[layer][head][count:]
        return outputs

    def _add_column_sums(self, layer: int, h: int, sums: torch.Tensor) -> None:
        """sums [slots]: what some queries of query head h brought to each slot in a prefill."""
        if self.log_weights is None:
            # First prefill: nothing is evicted yet, so slot index is position.
            total = sums.clone()
            total[: len(self.column_sums[layer][h])] += self.column_sums[layer][h]
            self.column_sums[layer][h] = total
        if self.config.selection == "reread":
            return  # scores are peaks
        # "a[g,j] = sum over the G query heads of the group of c[h,j]".
        for slot, column_sum in zip(self.slots[layer][h // self.group_size], sums.tolist(), strict=True):
            slot.score += column_sum

    def finish_prefill_chunk(self, num_tokens: int) -> None:
        self.num_seen_tokens += num_tokens
        self.num_prefilled += num_tokens
        self.pending = True

    def finalize(self) -> None:
        """ "`finalize` runs once, before the first decode step attends, or when called. Budgets are set there" """
        if not self.pending:
            return
        self.pending = False
        self._add_waiting()
        config = self.config
        # Section 4b: "rate r_i: mean attention token i got from the last rate_window (32) prompt queries, summed over
        # the group's query heads, plus 1e-9". A later turn's rates are those of its own last queries.
        for layer in range(self.num_layers):
            for head in range(self.num_kv_heads):
                rows = self.window[layer][head]
                total = torch.zeros(len(self.slots[layer][head]), dtype=torch.float64)
                for row in rows:
                    total[: len(row)] += row  # zero where not causal: an earlier chunk's row lacks the later slots
                for slot, mass in zip(self.slots[layer][head], total.tolist(), strict=True):
                    slot.rate = mass / len(rows) + RATE_EPSILON
                self.window[layer][head] = []
        first = self.log_weights is None
        if first:
            self.log_weights = self._log_weights()
        # Section 5: "at the next finalize the layer weights w of the first prefill are kept, T is the number of tokens
        # seen, and each layer is evicted to its new S_l (absolute budgets stay as they are)".
        if first or config.keep_tokens is None:
            of_units = dataclasses.replace(config, protected_layers=sorted(self.protected))
            slots, self.ratios = layer_slots(of_units, self.log_weights, self.num_seen_tokens)
            # "N_l = floor(heavy_fraction * S_l), M_l = S_l - N_l".
            heavy = [floor(config.heavy_fraction * s) for s in slots]
            self.budgets = [(n, s - n) for n, s in zip(heavy, slots, strict=True)]
        for unit, (layer, heads) in enumerate(self.units):
            if unit in self.protected:
                continue
            # With a reach slots keep their pooled rates from here on; merging still goes by those measured.
            carries = config.selection_reach is not None and config.selection in ("window", "mixed", "joint")
            carried = [slot for head in heads if carries for slot in self.slots[layer][head]]
            pooled = [rate for head in heads if carries for rate in self.pooled_rates(self.slots[layer][head])]
            gains = [rate - slot.rate for rate, slot in zip(pooled, carried, strict=True)]
            if self.num_live(unit) > sum(self.budgets[unit]):
                self.evict(unit, pooled=True)
            for slot, gain in zip(carried, gains, strict=True):
                slot.rate = max(slot.rate + gain, 0.0)

    def _log_weights(self) -> list[float]:
        """Of every unit. `ranked`: w is the share of the unit's tokens among the floor(keep_ratio * all) highest ranked
        tokens of the model; ties: lower layer, head, position."""
        config = self.config
        if config.allocation != "ranked":
            per_unit = [[self.column_sums[layer][h] for head in heads for h in self._group(head)]
                        for layer, heads in self.units]  # fmt: skip
            return layer_log_weights(config, [torch.stack(sums) for sums in per_unit], self.has_sinks)
        everything = []
        for unit, (layer, heads) in enumerate(self.units):
            for head in heads:
                rank = self.ranks(self.slots[layer][head], pooled=True)
                everything += [(-r, unit, head, s.position) for r, s in zip(rank, self.slots[layer][head], strict=True)]
        ratio = config.keep_ratio or min(1.0, config.keep_tokens / self.num_seen_tokens)
        best = sorted(everything)[: floor(ratio * len(everything))]
        counts = [sum(unit == u for _, u, _, _ in best) for unit in range(len(self.units))]
        return [math.log(count / len(best)) if count else -700.0 for count in counts]

    # -- decode: section 5 --------------------------------------------------------------------------------------------

    def decode_step(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax: OracleSoftmax
    ) -> torch.Tensor:
        """One layer of one decode step. The caller has run `finalize`, and counted the new token in num_seen_tokens."""
        config = self.config
        position = self.num_seen_tokens - 1
        # "1. Append (k_t, v_t) with position t, score 0. 2. Attend over all live slots."
        self._append(layer, keys, values, [position])
        outputs, probabilities = self._attend(layer, queries, [position], softmax)
        for head in range(self.num_kv_heads):
            group_probabilities = sum(probabilities[h][0] for h in self._group(head)).tolist()
            for slot, p in zip(self.slots[layer][head], group_probabilities, strict=True):
                # "3. a[g,s] += the probabilities on slot s, summed over the group's query heads, the new slot's own
                # included."
                slot.score = max(slot.score, p) if config.selection == "reread" else slot.score + p
                # Section 4b: "r <- (1 - 1/rate_window) * r + p / rate_window ... (a new slot starts at its own p)".
                if slot.position == position:
                    slot.rate = p
                else:
                    slot.rate = (1 - 1 / config.rate_window) * slot.rate + p / config.rate_window
        # "4. When the live count reaches S_l + eviction_interval, evict the surplus over S_l". READING: protected
        # layers "keep everything", also while decoding.
        interval = config.eviction_interval
        for unit, (of_layer, _) in enumerate(self.units):
            if of_layer != layer or unit in self.protected or interval is None:
                continue
            if self.num_live(unit) >= sum(self.budgets[unit]) + interval:
                self.evict(unit, pooled=False)
        return outputs

    # -- section 3 ----------------------------------------------------------------------------------------------------

    def pooled_rates(self, slots: list[Slot]) -> list[float]:
        """What slots rank by at the end of a prefill, in position order."""
        rates, share = self.own_pooled_rates(slots), self.config.joint_share
        if self.config.selection != "joint":
            return rates
        # A slot with k others above it by accumulated attention over age (by more than rounding) has no less than the
        # rate that is floor(k * (1 - share) / share)-th, counted from 0.
        means = [s.score / max(self.num_seen_tokens - s.position, MIXED_MIN_AGE) for s in slots]
        levels = sorted(rates, reverse=True)
        for i, mean in enumerate(means):
            place = sum(one > mean * (1 + 1e-10) for one in means)
            rates[i] = max(rates[i], levels[min(int(place * ((1 - share) / share)), len(slots) - 1)])
        return rates

    def own_pooled_rates(self, slots: list[Slot]) -> list[float]:
        """Of the last queries alone."""
        config = self.config
        if config.selection_reach is not None:
            # A mean over the token and the live ones before it, sinks left out, whose weights fall by e every `reach`
            # positions and would add up to 1 without a beginning and gaps.
            rates = []
            for number, slot in enumerate(slots):
                lenders = [t for t in slots[: number + 1] if t.position >= config.num_sink_tokens]
                weights = [math.exp((t.position - slot.position) / config.selection_reach) for t in lenders]
                summed = sum(t.rate * weight for t, weight in zip(lenders, weights, strict=True))
                rates.append(summed * (1 - math.exp(-1 / config.selection_reach)) if lenders else slot.rate)
            return rates
        # "max-pooled over selection_pool (7) neighbouring positions at finalize". READING: over all live slots,
        # sinks and recent tokens too, by distance in POSITION (a later turn's slots have gaps).
        below, above = config.selection_pool // 2, (config.selection_pool - 1) // 2
        if config.selection_pool_side == "after":
            below, above = config.selection_pool - 1, 0
        return [max(t.rate for t in slots if -below <= t.position - s.position <= above) for s in slots]

    def ranks(self, slots: list[Slot], pooled: bool) -> list[float]:
        """What a KV head's slots are ranked by, larger is better."""
        config = self.config
        if config.selection == "recent":
            return [float(s.position) for s in slots]
        if config.selection in ("cumulative", "reread"):
            return [s.score for s in slots]
        if config.selection == "average":
            return [s.score / max(self.num_seen_tokens - s.position, MIXED_MIN_AGE) for s in slots]
        rates = self.pooled_rates(slots) if pooled else [s.rate for s in slots]
        if config.selection in ("window", "joint"):
            return rates
        # mixed: "the pooled rate plus a / max(tokens seen - position, 32)".
        seen = self.num_seen_tokens
        return [r + s.score / max(seen - s.position, MIXED_MIN_AGE) for r, s in zip(rates, slots, strict=True)]

    def evict(self, unit: int, pooled: bool) -> None:
        """Sections 3 and 4: choose per KV head, then merge or drop."""
        config = self.config
        layer, heads = self.units[unit]
        num_heavy, num_recent = self.budgets[unit]
        kept: list[list[Slot]] = []
        evicted: list[list[Slot]] = []
        targets: list[list[Slot]] = []
        for slots in [self.slots[layer][head] for head in heads]:
            # "Keep the first num_sink_tokens (4), the last M_l by position, and the top N_l - num_sink_tokens of the
            # rest by score. Ties: the LOWER position is kept." READING: no more sinks than heavy slots.
            num_sinks = min(config.num_sink_tokens, num_heavy)
            sinks, recent = slots[:num_sinks], slots[len(slots) - num_recent :]
            rank = {s.position: r for s, r in zip(slots, self.ranks(slots, pooled), strict=True)}
            rest = sorted(slots[num_sinks : len(slots) - num_recent], key=lambda s: (-rank[s.position], s.position))
            heavy, out = rest[: num_heavy - num_sinks], rest[num_heavy - num_sinks :]
            kept.append(sorted(sinks + heavy + recent, key=lambda s: s.position))
            evicted.append(sorted(out, key=lambda s: s.position))
            if config.merge != "mass":
                targets.append(kept[-1])  # section 4: "max over kept j"
            elif config.merge_targets == "kept":
                # Section 4b: "all kept tokens but the sinks".
                targets.append(sorted(heavy + recent, key=lambda s: s.position))
            else:
                # Section 4b: "only the max(1, floor(tail_fraction * S_l)) lowest ranked (... ties: the later position)
                # among the kept tokens that are neither sinks nor recent". `heavy` is in rank order already.
                count = max(1, floor(config.tail_fraction * (num_heavy + num_recent)))
                # "while decoding no more than max_decode_tail": `pooled` tells an eviction of a prompt.
                if not pooled and config.max_decode_tail is not None:
                    count = min(count, config.max_decode_tail)
                targets.append(sorted(heavy[-count:], key=lambda s: s.position))
        if config.merge == "none":
            similarity = [[0.0] * len(out) for out in evicted]
            nearest = [[0] * len(out) for out in evicted]
            merged = [[False] * len(out) for out in evicted]
        else:
            pairs = [nearest_targets(out, t) for out, t in zip(evicted, targets, strict=True)]
            similarity = [[u for u, _ in head] for head in pairs]
            nearest = [[j for _, j in head] for head in pairs]
            merged = self.gate(unit, similarity)
            for head in range(len(heads)):
                for j, target in enumerate(targets[head]):
                    mine = [i for i in range(len(evicted[head])) if merged[head][i] and nearest[head][i] == j]
                    if mine:
                        sources = [evicted[head][i] for i in mine]
                        merge_into(config, target, sources, [similarity[head][i] for i in mine])
        self.evictions.append(
            Eviction(
                layer=layer,
                num_seen_tokens=self.num_seen_tokens,
                evicted=[[s.position for s in out] for out in evicted],
                similarity=similarity,
                target=[[t[j].position if t else -1 for j in n] for t, n in zip(targets, nearest, strict=True)],
                merged=merged,
                threshold=self.thresholds[unit],
            )
        )
        for head, stay in zip(heads, kept, strict=True):
            self.slots[layer][head] = stay

    # -- section 4 ----------------------------------------------------------------------------------------------------

    def gate(self, unit: int, similarity: list[list[float]]) -> list[list[bool]]:
        """Which evicted tokens are merged, per KV head in position order."""
        config = self.config
        everything = sorted(u for head in similarity for u in head if u > -math.inf)
        if not everything:  # no head has a merge target
            return [[False] * len(head) for head in similarity]
        if config.gate == "quantile" and config.merge != "released":
            # "merge all but the drop_quantile = 0.25 least similar of this eviction, over all KV heads of the layer".
            dropped = floor(config.drop_quantile * len(everything))
            cut = everything[dropped] if dropped < len(everything) else math.inf
            return [[u >= cut for u in head] for head in similarity]
        # "first eviction of the sequence: tau = mean of u_i; later: tau = ema_beta * agg(u_i) + (1 - ema_beta) * tau".
        mean = sum(everything) / len(everything)
        if self.thresholds[unit] is None:
            tau = mean
        else:
            aggregate = everything[-1] if config.threshold_agg == "max" else mean
            tau = config.ema_beta * aggregate + (1 - config.ema_beta) * self.thresholds[unit]
        self.thresholds[unit] = tau
        if config.merge == "released":
            # Section 6: "evicted row n passes if the MEAN over heads of u at row n reaches tau".
            rows = len(similarity[0])
            passes = [sum(head[n] for head in similarity) / len(similarity) >= tau for n in range(rows)]
            return [list(passes) for _ in similarity]
        # "Gate: merge i if u_i >= tau, else drop it for good."
        return [[u >= tau for u in head] for head in similarity]

    def snapshot(self) -> list[dict[str, torch.Tensor]]:
        return snapshot(self.slots)
