"""Index maps: every map is a partition of the tokens, its inverses are inverses, and zigzag is level."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o_dist.comm import BlockStriped, Contiguous, Zigzag

RULES = {
    "contiguous": Contiguous,
    "zigzag": Zigzag,
    "striped1": lambda length, world: BlockStriped(length, world, 1),
    "striped7": lambda length, world: BlockStriped(length, world, 7),
}
maps = st.builds(
    lambda rule, length, world: RULES[rule](length, world),
    st.sampled_from(sorted(RULES)),
    st.integers(0, 90),
    st.integers(1, 9),
)
quick = settings(max_examples=150, deadline=None)


@quick
@given(maps)
def test_shards_are_a_partition_in_ascending_order(shards):
    parts = [shards.indices(rank) for rank in range(shards.world)]
    assert [len(part) for part in parts] == shards.lengths()
    assert all(bool((part[1:] > part[:-1]).all()) for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(shards.length))


@quick
@given(maps)
def test_owner_and_places_invert_indices(shards):
    for rank in range(shards.world):
        part = shards.indices(rank)
        places = torch.arange(len(part))
        assert torch.equal(shards.owner(part), torch.full_like(part, rank))
        assert torch.equal(shards.to_local(part), places)
        for place, index in enumerate(part.tolist()):
            assert (shards.owner(index), shards.to_local(index)) == (rank, place)


@quick
@given(maps)
def test_segments_are_the_longest_runs(shards):
    for rank in range(shards.world):
        runs = shards.segments(rank)
        assert [index for start, stop in runs for index in range(start, stop)] == shards.indices(rank).tolist()
        assert all(start < stop for start, stop in runs)
        assert all(before[1] < after[0] for before, after in zip(runs, runs[1:], strict=False))


@quick
@given(maps)
def test_a_rank_takes_its_tokens(shards):
    tensor = torch.arange(2 * shards.length * 3).view(2, shards.length, 3)
    for rank in range(shards.world):
        assert torch.equal(shards.take(tensor, rank, 1), tensor[:, shards.indices(rank)])


@quick
@given(st.integers(0, 90), st.integers(1, 9))
def test_contiguous_and_zigzag_lengths_differ_by_at_most_one(length, world):
    for rule in (Contiguous, Zigzag):
        lengths = rule(length, world).lengths()
        assert max(lengths) - min(lengths) <= 1


def causal_work(shards) -> list[int]:
    """Query-key pairs of each rank under a causal mask."""
    return [int((shards.indices(rank) + 1).sum()) for rank in range(shards.world)]


@quick
@given(st.integers(1, 20), st.integers(1, 9))
def test_zigzag_work_is_equal_where_lengths_divide(chunk, world):
    assert len(set(causal_work(Zigzag(chunk * 2 * world, world)))) == 1


@quick
@given(st.integers(0, 300), st.integers(1, 9))
def test_zigzag_work_differs_by_about_a_token_elsewhere(length, world):
    work = causal_work(Zigzag(length, world))
    assert max(work) - min(work) <= 2 * length  # at most one more query, and a shift of one within the chunks


def test_the_layouts_of_the_docstring():
    def picture(shards):
        return "".join(str(rank) for rank in shards.owner(torch.arange(shards.length)).tolist())

    assert picture(Contiguous(16, 2)) == "0000000011111111"
    assert picture(Zigzag(16, 2)) == "0000111111110000"
    assert picture(BlockStriped(16, 2, 2)) == "0011001100110011"
    assert Zigzag(16, 2).segments(1) == [(4, 12)]
    assert Zigzag(3, 4).lengths() == [1, 1, 1, 0] and Zigzag(3, 4).segments(3) == []


def test_long_maps_need_no_loop_over_tokens():
    shards = BlockStriped(1_000_000, 4, 1)
    assert torch.equal(shards.indices(3), torch.arange(3, 1_000_000, 4))
    assert shards.owner(999_999) == 3 and shards.to_local(999_999) == 249_999


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Contiguous(-1, 2), ValueError, r"length \(-1\)"),
        (lambda: Zigzag(4, 0), ValueError, r"world \(0\)"),
        (lambda: BlockStriped(4, 2, 0), ValueError, r"block \(0\)"),
        (lambda: Zigzag(4, 2).indices(2), IndexError, r"rank \(2\) must be in \[0, world \(2\)\)"),
        (lambda: Zigzag(4, 2).owner(4), IndexError, r"token index \(4\) must be in \[0, length \(4\)\)"),
        (lambda: Zigzag(4, 2).to_local(torch.tensor([0, -1])), IndexError, r"token index \(-1\)"),
        (lambda: Zigzag(4, 2).take(torch.zeros(5), 0, 0), ValueError, r"\(5\) must be the length \(4\)"),
    ],
)
def test_errors_name_both_numbers(call, error, message):
    with pytest.raises(error, match=message):
        call()
