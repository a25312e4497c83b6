"""One eviction of one row with loops and Python lists, straight from the text of docs/algorithm.md."""

from __future__ import annotations

import math

import torch


def naive_order(slots: list[dict], config, *, finalize: bool) -> list[dict[int, tuple[float, float]]]:
    """Of each head, by position: what a slot ranks by, and what its rate gains if it stays."""
    seen, orders = 1 + max(max(head["p"]) for head in slots), []
    for head in slots:
        orders.append({})
        for i, position in enumerate(head["p"]):
            back, ahead = config.selection_pool // 2, config.selection_pool // 2
            if config.selection_pool_side == "after":
                back, ahead = config.selection_pool - 1, 0
            near = [head["r"][j] for j, p in enumerate(head["p"]) if -back <= p - position <= ahead]
            if config.selection_reach is not None and position >= config.num_sink_tokens:
                near = [(1 - math.exp(-1 / config.selection_reach)) * sum(
                    head["r"][j] * math.exp((p - position) / config.selection_reach)
                    for j, p in enumerate(head["p"]) if config.num_sink_tokens <= p <= position
                )]  # fmt: skip
            elif config.selection_reach is not None:
                near = [head["r"][i]]
            rate = max(near) if finalize else head["r"][i]
            rank = {
                "cumulative": head["s"][i], "window": rate, "recent": float(position),
                "mixed": rate + head["s"][i] / max(seen - position, 32),
            }[config.selection]  # fmt: skip
            orders[-1][position] = rank, max(near) - head["r"][i]
    return orders


def naive_compress(
    slots: list[dict], num_heavy: int, num_recent: int, tau: float | None, config, *, finalize: bool,
    order: list[dict[int, tuple[float, float]]] | None = None, is_last: bool = True,
):  # fmt: skip
    """`slots[head]` is a dict of lists `k, v, p, s, r, m` in order of position; returns the same and the threshold.

    order: of an earlier step of the same eviction; is_last: whether no step follows.
    """
    size, order = num_heavy + num_recent, order or naive_order(slots, config, finalize=finalize)
    plans, similar = [], []
    for head, by_position in zip(slots, order, strict=True):
        count = len(head["p"])
        rank = [by_position[position][0] for position in head["p"]]
        sinks = [i for i in range(count) if head["p"][i] < config.num_sink_tokens][:num_heavy]
        recent = list(range(count - num_recent, count))
        rest = [i for i in range(count) if i not in sinks and i not in recent]
        rest.sort(key=lambda i: (-rank[i], head["p"][i]))
        heavy = rest[: num_heavy - len(sinks)]
        keep = sorted(sinks + heavy + recent)
        evict = sorted(set(range(count)) - set(keep))
        targets = keep
        if config.merge_targets == "tail":
            most = max(1, math.floor(config.tail_fraction * size + 1e-9))
            if not finalize and config.max_decode_tail is not None and most > config.max_decode_tail:
                most = config.max_decode_tail
            targets = sorted(heavy[-most:] if heavy else [])
        elif config.merge == "mass":
            targets = [i for i in keep if i not in sinks]
        found = []
        for i in evict:
            best, where = -math.inf, None
            for j in targets:
                norms = head["k"][i].norm() * head["k"][j].norm()
                cosine = float(head["k"][i] @ head["k"][j] / norms) if norms > 0 else 0.0
                if cosine > best + 1e-12:
                    best, where = cosine, j
            found.append((best, where))
        plans.append((keep, evict, found))
        similar += [u for u, _ in found]

    carries = is_last and finalize and config.selection_reach is not None and config.selection in ("window", "mixed")
    gains = [[by_position[p][1] for p in head["p"]] for head, by_position in zip(slots, order, strict=True)]
    if not similar:
        if carries:
            slots = [{**head, "r": [r + g for r, g in zip(head["r"], gain, strict=True)]}
                     for head, gain in zip(slots, gains, strict=True)]  # fmt: skip
        return slots, tau
    finite = [u for u in similar if u > -math.inf]
    mean = sum(finite) / max(len(finite), 1)
    latest = max(finite, default=0) if config.threshold_agg == "max" else mean
    if finite and config.merge != "none":
        tau = mean if tau is None else config.ema_beta * latest + (1 - config.ema_beta) * tau
    cut = tau
    if config.gate == "quantile":
        cut = sorted(similar)[math.floor(config.drop_quantile * len(similar) + 1e-9)]
    row_means = [sum(plan[2][n][0] for plan in plans) / len(plans) for n in range(len(plans[0][1]))]

    out = []
    for head, gain, (keep, evict, found) in zip(slots, gains, plans, strict=True):
        new = {name: [values[i] for i in keep] for name, values in head.items()}
        for n, j in enumerate(keep):
            members = []
            for number, (i, (u, where)) in enumerate(zip(evict, found, strict=True)):
                if config.merge == "none" or where != j:
                    continue
                if (row_means[number] >= tau) if config.merge == "released" else u >= cut:
                    members.append((i, u))
            if not members:
                continue
            if config.merge == "mass":
                mass = head["r"][j] + sum(head["r"][i] for i, _ in members)
                total = head["r"][j] * head["v"][j] + sum(head["r"][i] * head["v"][i] for i, _ in members)
                new["v"][n] = total / mass
                new["m"][n] = min(head["m"][j] + math.log(mass / head["r"][j]), config.max_log_mass)
                new["r"][n] = mass
                continue
            for name in ("k", "v") if config.merge != "values" else ("v",):
                if config.merge == "released":
                    new[name][n] = (head[name][j] + sum(u * head[name][i] for i, u in members)) / (1 + len(members))
                else:
                    weight = config.self_weight + sum(math.exp(u) for _, u in members)
                    added = sum(math.exp(u) * head[name][i] for i, u in members)
                    new[name][n] = (config.self_weight * head[name][j] + added) / weight
        if carries:
            new["r"] = [rate + gain[j] for rate, j in zip(new["r"], keep, strict=True)]
        out.append(new)
    return out, tau


def to_lists(slots, row: int) -> list[dict]:
    """The live slots of one row of `Slots`, per head."""
    count = int(slots.kv_len[row])
    return [
        {
            "k": list(slots.keys[row, h, :count]), "v": list(slots.values[row, h, :count]),
            "p": slots.positions[row, h, :count].tolist(), "s": slots.scores[row, h, :count].tolist(),
            "r": slots.rates[row, h, :count].tolist(), "m": slots.log_mass[row, h, :count].tolist(),
        }
        for h in range(slots.positions.shape[1])
    ]  # fmt: skip


def assert_row_equals(slots, row: int, expected: list[dict]) -> None:
    """One row of `Slots` holds what the lists hold."""
    for h, head in enumerate(expected):
        count = len(head["p"])
        assert int(slots.kv_len[row]) == count
        assert slots.positions[row, h, :count].tolist() == head["p"]
        for name, key in (("keys", "k"), ("values", "v")):
            torch.testing.assert_close(getattr(slots, name)[row, h, :count], torch.stack(head[key]))
        for name, key in (("scores", "s"), ("rates", "r"), ("log_mass", "m")):
            expected_row = torch.tensor(head[key], dtype=slots.scores.dtype)
            torch.testing.assert_close(getattr(slots, name)[row, h, :count], expected_row)
