"""Rows from documents: nothing lost, nothing twice, targets inside documents only."""

import numpy as np
import pytest

from d2o_dist.train.batches import StepOrder, make_batch
from d2o_dist.train.losses import IGNORED
from d2o_dist.train.rows import PackedRows, WindowRows


class Texts:
    """Documents whose tokens are numbered through, so that every token is known wherever it turns up."""

    def __init__(self, lengths, counted=None):
        self.lengths = np.array(lengths)
        self.starts = self.lengths.cumsum() - self.lengths
        self.all_counted = counted is None
        self.counted = counted

    def piece(self, number, start, stop):
        ids = np.arange(start, min(stop, self.lengths[number])) + self.starts[number]
        return ids, np.ones(len(ids), bool) if self.all_counted else self.counted[ids]


@pytest.mark.parametrize("lengths", [[5, 1, 30, 0, 8, 3], [100], [1] * 40, [16, 16, 16]])
@pytest.mark.parametrize("length", [7, 16])
def test_packing_uses_every_token_once(lengths, length):
    texts = Texts(lengths)
    rows = PackedRows(texts, length, seed=4)
    assert len(rows) == sum(lengths) // length
    seen = []
    for row in (rows[number] for number in range(len(rows))):
        assert len(row.input_ids) == length == sum(row.documents)
        start = 0
        for count in row.documents:
            ids, positions, targets = (getattr(row, name)[start : start + count]
                                       for name in ("input_ids", "position_ids", "targets"))  # fmt: skip
            assert positions.tolist() == list(range(count))
            assert targets.tolist() == [*ids[1:], IGNORED]
            document = np.searchsorted(texts.starts, ids, side="right") - 1
            owner = [int(max(d for d in range(len(lengths)) if texts.starts[d] <= i < texts.starts[d] + lengths[d]))
                     for i in ids]  # fmt: skip
            assert len(set(owner)) == 1 and len(document) == count
            start += count
        seen += row.input_ids.tolist()
    assert len(set(seen)) == len(seen) == len(rows) * length


def test_packing_order_depends_on_the_seed_alone():
    texts = Texts([3, 9, 4, 7, 12])
    first = [PackedRows(texts, 5, seed=1)[n].input_ids.tolist() for n in range(7)]
    assert first == [PackedRows(texts, 5, seed=1)[n].input_ids.tolist() for n in range(7)]
    assert first != [PackedRows(texts, 5, seed=2)[n].input_ids.tolist() for n in range(7)]


def test_windows_are_parts_of_one_document():
    rows = WindowRows(Texts([25, 9, 30]), 10, first_target=5)
    assert [rows[n].input_ids[0] for n in range(len(rows))] == [0, 10, 34, 44, 54]
    assert rows[0].documents == (10,) and rows[0].targets.tolist() == [*range(1, 10), IGNORED]


def test_windows_without_a_target_after_the_context_are_left_out():
    counted = np.zeros(40, bool)
    counted[[3, 17]] = True
    rows = WindowRows(Texts([40], counted), 10, first_target=5)
    assert [rows[n].input_ids[0] for n in range(len(rows))] == [10]
    assert np.flatnonzero(rows[0].targets != IGNORED).tolist() == [6]  # the token before the counted one


def test_every_epoch_is_a_permutation_shared_by_replicas():
    alone = StepOrder(10, 7, 6, 2)
    steps = [alone.rows(step) for step in range(5)]
    flat = [row for step in steps for micro in step for row in micro]
    assert [len(step) for step in steps] == [3] * 5
    assert sorted(flat[:10]) == sorted(flat[10:20]) == sorted(flat[20:]) == list(range(10))
    assert flat[:10] != flat[10:20]
    for step in range(5):
        shared = [StepOrder(10, 7, 6, 1, 3, rank).rows(step) for rank in range(3)]
        together = {row for rank in shared for micro in rank for row in micro}
        assert together == {row for micro in steps[step] for row in micro}
    with pytest.raises(ValueError, match="the data give no row"):
        StepOrder(0, 7, 6, 2)


@pytest.mark.parametrize("context", [None, 8])
def test_shards_of_a_batch_are_the_whole(context):
    rows = PackedRows(Texts([3, 5, 2, 6, 7, 9]), 16, 0)
    whole = make_batch([rows[0], rows[1]], context, 0, 1, "cpu")
    shards = [make_batch([rows[0], rows[1]], context, rank, 4, "cpu") for rank in range(4)]
    for name in whole.counts:
        for tensor in ("input_ids", "position_ids", "targets"):
            joined = np.concatenate([getattr(shard.arguments[name], tensor) for shard in shards], 1)
            assert (joined == getattr(whole.arguments[name], tensor).numpy()).all()
        assert sum(shard.counts[name] for shard in shards) == whole.counts[name]
    assert sum(shard.num_tokens for shard in shards) == whole.num_tokens == 32
    if context is None:
        assert whole.arguments["documents"] == [list(rows[0].documents), list(rows[1].documents)]
