"""Tiled losses equal the losses of all logits at once, values and gradients."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from d2o_dist.train.losses import IGNORED, distill_loss, lm_loss


def inputs(rows=2, length=13, hidden=6, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=torch.float64)
    nn.init.normal_(head.weight, generator=generator)
    states = torch.randn(2, rows, length, hidden, dtype=torch.float64, generator=generator)
    targets = torch.randint(vocabulary, (rows, length), generator=generator)
    targets[0, :5] = IGNORED
    return head, states[0].requires_grad_(), states[1], targets


def gradients(head, states, loss):
    head.weight.grad = states.grad = None
    loss.backward()
    return head.weight.grad.clone(), states.grad.clone()


@pytest.mark.parametrize("tile", [1, 4, 13, 26, 1000])
def test_lm_loss_and_its_gradients(tile):
    head, states, _, targets = inputs()
    logits = head(states).flatten(0, -2)
    expected = cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    found = lm_loss(head, states, targets, tile)
    torch.testing.assert_close(found, expected)
    for one, two in zip(gradients(head, states, found), gradients(head, states, expected), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("tile", [1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distill_loss_and_its_gradients(tile, temperature):
    head, states, teacher, targets = inputs()
    counted = targets != IGNORED
    wanted = log_softmax(head(teacher).detach() / temperature, -1)
    each = kl_div(log_softmax(head(states) / temperature, -1), wanted, reduction="none", log_target=True).sum(-1)
    expected = each[counted].sum() * temperature**2
    found = distill_loss(head, states, teacher.requires_grad_(), counted, tile, temperature)
    torch.testing.assert_close(found, expected)
    for one, two in zip(gradients(head, states, found), gradients(head, states, expected), strict=True):
        torch.testing.assert_close(one, two)
    assert teacher.grad is None


def test_a_tile_is_the_largest_piece_of_logits(monkeypatch):
    head, states, _, targets = inputs()
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    lm_loss(head, states, targets, 4).backward()
    # Forward and once more backward.
    assert max(seen) == 4 and sum(seen) == 2 * targets.numel()
    seen.clear()
    with torch.no_grad():
        lm_loss(head, states, targets, 4)
    assert sum(seen) == targets.numel()


def test_nothing_counted_is_zero_with_zero_gradients():
    head, states, _, targets = inputs()
    loss = lm_loss(head, states, torch.full_like(targets, IGNORED), 4)
    assert float(loss) == 0 and not any(grad.any() for grad in gradients(head, states, loss))
