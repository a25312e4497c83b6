"""What shares by dispersion are worth where few layers share: N layers are drawn from a model that has many.

    python studies/few_layers.py MODEL TEXT

prints two tables of docs/results/few_layers.md: how shares of the drawn layers vary between passages of a text and with
the layers drawn; and how far what follows a passage is from the full cache, where the drawn layers are compressed to 5%
by dispersion and by equal shares, and the others keep all. Standard scores of some layers follow from those of all.
"""

from __future__ import annotations

import random
import statistics
import sys
from itertools import combinations

import torch
from torch.nn.functional import kl_div

from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.profile import passages
from d2o_dist.engine.reading import read
from d2o_dist.eval.reading import Reading
from d2o_dist.models import loading
from d2o_dist.models.loading import adapt
from d2o_dist.policy.budget import Dispersion, Profile
from d2o_dist.policy.config import D2OConfig

RULE = Dispersion(min_layers=0, min_layer_tokens=0)
PASSAGES, PROMPT, AFTER = 6, 1024, 64
COUNTS, DRAWS, KEEP = (3, 4, 6, 8, 10, 12, 18, 24), 500, 0.05
COMPRESSED, SETS = (3, 6, 12), 6


def shares_of(scores: list[float], layers: list[int]) -> torch.Tensor:
    """[N] of an average of 1, where these layers share alone."""
    logs = RULE.dispersions(torch.tensor(scores, dtype=torch.float64)[layers].exp()[:, None]).tolist()
    return torch.tensor(RULE.log_weights(len(layers), logs)).exp() * len(layers)


def measured(model, rows: list[list[int]]) -> list[list[float]]:
    """[passages][L] standard scores of the layers' variances."""
    found = []
    for row in rows:
        ids = torch.tensor([row[:PROMPT]])
        cache = model.make_cache(D2OConfig(budget=RULE, statistics={"query_stride": 1}))
        read(model, cache, ids, torch.ones_like(ids))
        cache.finalize()
        found.append(cache.compressed.plans[0].dispersions)
    return found


def between_passages(scores: list[list[float]]) -> None:
    """The first table: medians, and in brackets the 5th and 95th of 100."""
    total = len(scores[0])
    print("| layers | correlation between passages | largest over smallest share | a step of dispersion is worth |")
    print("|---|---|---|---|")
    for count in (*(count for count in COUNTS if count < total), total):
        drawn, correlations, spreads, steps = random.Random(count), [], [], []
        for _ in range(DRAWS):
            layers = sorted(drawn.sample(range(total), count))
            shares = [shares_of(one, layers) for one in scores]
            correlations += [float(torch.corrcoef(torch.stack(two))[0, 1]) for two in combinations(shares, 2)]
            spreads += [float(one.max() / one.min()) for one in shares]
            # Over what it is worth among all layers, whose scores have a deviation of 1.
            steps.append(1 / float(torch.tensor(scores[0])[layers].std()))
        print(f"| {count} | {_range(correlations, 3)} | {_range(spreads)} | {_range(steps)} |", flush=True)


def _range(values: list[float], digits: int = 2) -> str:
    values = sorted(values)
    low, middle, high = (f"{values[int(part * (len(values) - 1))]:.{digits}f}" for part in (0.05, 0.5, 0.95))
    return f"{middle} ({low} to {high})"


def divergences(model, rows: list[list[int]], scores: list[list[float]]) -> None:
    """The second table."""
    total, drawn, full = len(scores[0]), random.Random(0), D2OConfig.preset("full")
    print("| layers | by dispersion | equal | paired difference | dispersion farther |\n|---|---|---|---|---|")
    readings = [Reading(model, [row[:PROMPT]], [D2OConfig(), full], pad_id=0) for row in rows]
    wanted = [logits_of(reading.start(full), row[PROMPT:]) for reading, row in zip(readings, rows, strict=True)]
    for count in (*COMPRESSED, total):
        found = []
        for _ in range(SETS if count < total else 1):
            layers = sorted(drawn.sample(range(total), count))
            for reading, row, score, goal in zip(readings, rows, scores, wanted, strict=True):
                pair = []
                for shares in (shares_of(score, layers), torch.ones(count)):
                    whole = torch.ones(total, dtype=torch.float64)
                    whole[layers] = shares.double()
                    others = [index for index in range(total) if index not in layers]
                    keep = (len(others) + KEEP * count) / total
                    rule = Profile(shares=whole.tolist(), min_layer_tokens=0, protected_layers=others)
                    config = D2OConfig(keep_ratio=keep, budget=rule)
                    logits = logits_of(reading.start(config), row[PROMPT:])
                    pair.append(float(kl_div(logits, goal, reduction="none", log_target=True).sum(-1).mean()))
                found.append(pair)
        gaps = [by - equal for by, equal in found]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        both = " | ".join(f"{statistics.mean(column):.4f}" for column in zip(*found, strict=True))
        farther = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
        print(f"| {count} | {both} | {statistics.mean(gaps):+.4f} ± {error:.4f} | {farther} |", flush=True)


@torch.inference_mode()
def logits_of(session, row: list[int]) -> torch.Tensor:
    """[n, V] log-probabilities of a continuation."""
    session.prefill(None, None)
    return session.read([row], all_logits=True)[0].float().log_softmax(-1)


def main() -> None:
    config = InferConfig(model=sys.argv[1], dtype="float32", device="cpu")
    text = open(sys.argv[2], encoding="utf-8").read()
    ids = loading.load_tokenizer(config)(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = passages(ids, PASSAGES, PROMPT + AFTER)
    model = adapt(loading.load_model(config))
    with torch.inference_mode():
        scores = measured(model, rows)
    between_passages(scores)
    divergences(model, rows, scores)


if __name__ == "__main__":
    main()
