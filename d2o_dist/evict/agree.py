"""The debug switch: do the ranks of a request agree? Checksums of what they must hold alike, at an eviction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2o_dist.comm.request import RequestRanks


class DisagreementError(RuntimeError):
    """Ranks that must decide as one decided differently."""


def checksum(tensors: Sequence[Tensor | None]) -> int:
    """A number of 63 bits that depends on every bit and its place; None and an empty tensor count as well."""
    total = 17
    for tensor in tensors:
        if tensor is None:
            total = (total * 1000003 + 1) % (1 << 63)
            continue
        data = tensor.detach().contiguous().view(torch.uint8).flatten().long()
        weights = torch.arange(1, len(data) + 1, device=data.device) * 2654435761 % 2147483647
        total = (total * 1000003 + int((data * weights).sum()) + tensor.numel()) % (1 << 63)
    return total


def check_agreement(
    thresholds: Mapping[int, Tensor | None],
    positions: Mapping[int, Sequence[Tensor]],
    ranks: RequestRanks,
    *,
    spread: bool,
    what: str = "threshold",
) -> None:
    """Compare the layers of an eviction: thresholds between all ranks, positions between those that hold them alike.

    Args:
        thresholds: by layer, [B], or something else that all ranks know alike and the message calls `what`.
        positions: by layer, what the sequence ranks (`spread`) and the holders of copies of a KV head know alike;
            the same layers on every rank.

    Raises:
        DisagreementError: on every rank; it names the first layer and rank that differ from the first rank.
    """
    layers = sorted(thresholds)
    mine = torch.tensor([[checksum([thresholds[n]]), checksum(positions[n])] for n in layers])
    device = next((t.device for tensors in positions.values() for t in tensors), mine.device)
    table = ranks.tp.all_gather(ranks.sp.all_gather(mine[None, None].to(device), 1), 0).tolist()  # [tp][sp][layer]
    for number, layer in enumerate(layers):
        for t, row in enumerate(table):
            for s, sums in enumerate(row):
                copy_of = t // ranks.kv_replicas * ranks.kv_replicas
                wrong = []
                if sums[number][0] != table[0][0][number][0]:
                    wrong.append(what)
                if spread and sums[number][1] != row[0][number][1]:
                    wrong.append("positions")
                if ranks.kv_replicas > 1 and sums[number][1] != table[copy_of][s][number][1]:
                    wrong.append("positions of a copied KV head")
                if wrong:
                    raise DisagreementError(
                        f"layer {layer}: rank tp {t}, sp {s} differs from the first in {' and '.join(wrong)}. Ranks "
                        "that must decide as one did not: different libraries or devices, or a defect"
                    )
