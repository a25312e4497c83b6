"""Which tokens of a padded chunk are a row's: taken out and put back where they were."""

import pytest
import torch

from d2o_dist.slots.rows import Rows

LEFT, GAPS, EMPTY = [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]


@pytest.mark.parametrize("mask", [None, [LEFT, LEFT], [LEFT, EMPTY], [LEFT, GAPS]])
def test_what_is_put_is_what_was_picked(mask):
    rows = Rows.of(2, 5, None if mask is None else torch.tensor(mask))
    tensor = torch.randn(2, 3, 5, 4)
    out = torch.zeros_like(tensor)
    for row in range(2):
        picked = rows.pick(tensor, row)
        assert picked.shape == (1, 3, rows.counts[row], 4)
        rows.put(out, row, picked)
    kept = torch.ones(2, 5) if mask is None else torch.tensor(mask)
    assert torch.equal(out, tensor * kept[:, None, :, None])


def test_tokens_side_by_side_are_not_looked_up(monkeypatch):
    """Columns that travel to a GPU are a wait for it, for every row of every layer."""
    rows = Rows.of(2, 5, torch.tensor([LEFT, EMPTY]))
    tensor, out = torch.randn(2, 3, 5, 4), torch.zeros(2, 3, 5, 4)
    monkeypatch.setattr(torch.Tensor, "to", lambda *args, **kwargs: pytest.fail("columns were moved to a device"))
    for row in range(2):
        rows.put(out, row, rows.pick(tensor, row))
