"""Packed rows: documents attend to themselves only, in training and through plain `d2o` attention."""

import pytest
import torch

from d2o_dist.models.hf.packed import document_lengths
from tests.models import tiny_model, tokens
from tests.train.helpers import cut, tiny_objective

DOCUMENTS = [[9, 1, 30, 8], [20, 28]]


def positions_of(documents):
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])


def alone(family, ids, documents):
    """Logits of every document by itself, put back into rows."""
    model = tiny_model(family)
    rows = []
    with torch.no_grad():
        for row, lengths in zip(ids, documents, strict=True):
            rows.append(torch.cat([model(part[None]).logits[0] for part in row.split(lengths)]))
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_sliding"])
@pytest.mark.parametrize("documents", [DOCUMENTS, [[16, 32]] * 2])
def test_d2o_attention_keeps_packed_documents_apart(family, documents):
    ids = tokens(2, 48)
    model = tiny_model(family)
    with torch.no_grad():
        packed = model(ids, position_ids=positions_of(documents), use_cache=False).logits
        together = model(ids, use_cache=False).logits
    expected = alone(family, ids, documents)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-6)
    assert (together - expected).abs().max() > 1e-2


def test_position_ids_of_one_row_stand_for_all():
    assert document_lengths(torch.tensor([[0, 1, 0, 1, 2]]), 3, 5) == [[2, 3]] * 3
    assert document_lengths(torch.tensor([[0, 1, 2], [0, 0, 1]]), 2, 3) == [[3], [1, 2]]
    assert document_lengths(torch.arange(5)[None] + 7, 3, 5) is None
    assert document_lengths(None, 1, 5) is None
    assert document_lengths(torch.zeros(3, 1, 5), 1, 5) is None


def test_padding_is_not_taken_for_documents():
    """Position ids of left-padded rows, as generate makes them, restart too."""
    ids = tokens(1, 12)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    model = tiny_model()
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 4:]
        torch.testing.assert_close(padded, model(ids[:, 4:], use_cache=False).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_training_equals_separate_documents(family):
    """Loss and gradients of packed rows are the sums over their documents."""
    ids = tokens(2, 48)
    packed = tiny_objective(family)
    # Targets at the end of a document are those of the next one's first token: drop them, as packing does.
    row = cut(ids, 0, 48, positions=positions_of(DOCUMENTS))
    ends = torch.stack([torch.cat([torch.arange(n) == n - 1 for n in lengths]) for lengths in DOCUMENTS])
    row.targets[ends] = -100
    loss = packed("lm", row=row, documents=DOCUMENTS).total
    loss.backward()

    separate = tiny_objective(family)
    total = 0
    for tensor, lengths in zip(ids, DOCUMENTS, strict=True):
        for part in tensor.split(lengths):
            total = total + separate("lm", row=cut(part[None], 0, len(part))).total
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)
    for one, two in zip(packed.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-5)
