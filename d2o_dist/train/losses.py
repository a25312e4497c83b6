"""Losses over the vocabulary, a tile of tokens at a time: logits of a whole row never exist, forward or backward.

Shape legend: B rows, n tokens, H hidden dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

# A target that is not counted.
IGNORED = -100
# Hidden states [m, H] (of student and teacher) and what belongs to them -> a sum over the tile.
TileLoss = Callable[..., Tensor]


def lm_loss(head: nn.Module, hidden: Tensor, targets: Tensor, tile: int) -> Tensor:
    """The sum of cross entropies over all counted targets, in nats.

    Args:
        head: hidden states to logits.
        hidden: [B, n, H]; targets: [B, n] token ids, IGNORED where nothing is to be predicted.
        tile: tokens whose logits exist at once.
    """

    def one_tile(part: Tensor, wanted: Tensor) -> Tensor:
        logits = head(part)
        return cross_entropy(logits.to(_loss_dtype(logits)), wanted, ignore_index=IGNORED, reduction="sum")

    return _tiled(one_tile, tile, hidden.flatten(0, -2), targets.flatten())


def distill_loss(
    head: nn.Module, hidden: Tensor, teacher: Tensor, counted: Tensor, tile: int, temperature: float = 1.0
) -> Tensor:
    """The sum over counted tokens of KL(teacher || student), in nats, times temperature squared.

    Args:
        hidden, teacher: [B, n, H] hidden states of student and teacher; no gradient flows into the teacher's.
        counted: [B, n] bool.
    """

    def one_tile(part: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            logits = head(target)
            wanted = log_softmax(logits.to(_loss_dtype(logits)) / temperature, -1)
        logits = head(part)
        found = log_softmax(logits.to(_loss_dtype(logits)) / temperature, -1)
        each = kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        return (each * weight).sum() * temperature**2

    teacher = teacher.detach()
    return _tiled(one_tile, tile, hidden.flatten(0, -2), teacher.flatten(0, -2), counted.flatten())


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _tiled(one_tile: TileLoss, tile: int, *tensors: Tensor) -> Tensor:
    """The sum of `one_tile` over tiles of tokens; each tile's logits are computed again in the backward pass."""
    parts = zip(*(tensor.split(tile) for tensor in tensors), strict=True)
    recompute = torch.is_grad_enabled() and tensors[0].requires_grad
    total = 0
    for part in parts:
        # The check would compare weights that ZeRO-3 has let go of by then.
        tile_loss = (
            checkpoint(one_tile, *part, use_reentrant=False, determinism_check="none") if recompute else one_tile(*part)
        )
        total = total + tile_loss
    return total
