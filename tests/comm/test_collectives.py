"""Every collective against what one process computes from all ranks' inputs, in worlds of one to four processes."""

import pytest
import torch

from d2o_dist.comm import Collectives, ParallelMesh, build_mesh
from d2o_dist.comm.wire import to_wire
from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank
WORLDS = pytest.mark.parametrize("world", [1, 2, 3, 4])
MOVED = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.bool, torch.float8_e4m3fn]
REDUCED = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8]


def data(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What `rank` contributes: known to all ranks."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) * 3
    if dtype == torch.bool:
        return values > 0
    return (values if dtype.is_floating_point else values.abs()).to(dtype)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in shape, dtype and every bit."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, (found.dtype, found.shape, expected.shape)
    assert torch.equal(to_wire(found).view(torch.uint8), to_wire(expected).view(torch.uint8))


def sp_of(world: int) -> Collectives:
    return Collectives(build_mesh(sp=world).axis("sp"))


def all_reduces(rank, world):
    comm = sp_of(world)
    for dtype in REDUCED:
        terms = [data(r, 5, 3, dtype=dtype).T for r in range(world)]  # not contiguous
        mine = terms[rank].clone(memory_format=torch.preserve_format)
        stacked = torch.stack(terms).to(torch.float64)
        same(comm.all_reduce(mine, "max"), stacked.amax(0).to(dtype))
        same(comm.all_reduce(mine, "min"), stacked.amin(0).to(dtype))
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-6 if dtype == torch.float32 else 0
        torch.testing.assert_close(
            comm.all_reduce(mine).double(), stacked.sum(0), rtol=max(tolerance, 1e-15), atol=tolerance + 1e-14
        )
        same(mine, terms[rank])
    flags = [data(r, 40, dtype=torch.bool) for r in range(world)]
    same(comm.all_reduce(flags[rank], "max"), torch.stack(flags).any(0))
    same(comm.all_reduce(flags[rank], "min"), torch.stack(flags).all(0))
    same(comm.all_reduce(torch.tensor(float(rank)), "max"), torch.tensor(float(world - 1)))
    same(comm.all_reduce(torch.empty(0, 3)), torch.empty(0, 3))
    packed = torch.tensor([2**62 + 1 + rank, -(2**62) - rank])  # int64 keeps every bit
    same(comm.all_reduce(packed, "max"), torch.tensor([2**62 + world, -(2**62)]))


@WORLDS
def test_all_reduce(world):
    run_ranks(world, all_reduces)


def float_sums(rank, world, size):
    comm = sp_of(world)
    mine = data(rank, size, dtype=torch.float32) * 10.0 ** (rank * 2)
    return comm.all_reduce(mine), comm.sum_in_rank_order(mine), comm.sum_in_rank_order(mine.to(torch.bfloat16))


@pytest.mark.parametrize("size", [7, 300_000])
@WORLDS
def test_float_sums_have_the_same_bits_on_all_ranks(world, size):
    found = run_ranks(world, float_sums, size)
    terms = [data(r, size, dtype=torch.float32) * 10.0 ** (r * 2) for r in range(world)]
    ordered, rounded = terms[0].clone(), terms[0].bfloat16().float()
    for term in terms[1:]:
        ordered += term
        rounded += term.bfloat16().float()
    for reduced, in_order, half in found:
        same(reduced, found[0][0])
        same(in_order, ordered)
        same(half, rounded.bfloat16())


def all_gathers(rank, world):
    comm = sp_of(world)
    for dtype in MOVED:
        for dim in (0, 1, 2, -1):
            parts = [data(r, 2, 3, 5, dtype=dtype) for r in range(world)]
            same(comm.all_gather(parts[rank], dim), torch.cat(parts, dim))
            turned = [part.transpose(0, 2) for part in parts]
            same(comm.all_gather_async(turned[rank], dim).wait(), torch.cat(turned, dim))
        strided = torch.ones(4, 12).to(dtype).T[:1, :1]  # one element, yet its strides are not 1
        same(comm.all_gather(strided, 0), torch.ones(world, 1).to(dtype))
    same(comm.all_gather(torch.empty(0, 2), 0), torch.empty(0, 2))
    same(comm.all_gather(torch.empty(0, 2), 1), torch.empty(0, 2 * world))
    with_gradient = torch.ones(2, requires_grad=True)
    assert not comm.all_gather(with_gradient, 0).requires_grad


@WORLDS
def test_all_gather(world):
    run_ranks(world, all_gathers)


def uneven_gathers(rank, world):
    comm = sp_of(world)
    for lengths in ([3, 0, 5, 1], [0, 0, 0, 2], [0, 0, 0, 0], [4, 4, 4, 4]):
        lengths = lengths[-world:]
        for dtype in (torch.float64, torch.bool, torch.float8_e4m3fn):
            for dim in (0, -1):
                shapes = [(size, 2) if dim == 0 else (2, size) for size in lengths]
                parts = [data(r, *shape, dtype=dtype) for r, shape in enumerate(shapes)]
                same(comm.all_gather_uneven(parts[rank], dim, lengths), torch.cat(parts, dim))
                same(comm.all_gather_uneven(parts[rank], dim), torch.cat(parts, dim))


@WORLDS
def test_all_gather_uneven(world):
    run_ranks(world, uneven_gathers)


def reduce_scatters(rank, world):
    comm = sp_of(world)
    for dtype in (torch.float64, torch.int64):
        for dim in (0, 1, -1):
            terms = [data(r, 12, 12, dtype=dtype) for r in range(world)]
            total = torch.stack(terms).sum(0)
            expected = total.chunk(world, dim)[rank]
            torch.testing.assert_close(comm.reduce_scatter(terms[rank], dim), expected, rtol=1e-13, atol=1e-13)
            sizes = {1: [12], 2: [0, 12], 3: [5, 0, 7], 4: [1, 6, 5, 0]}[world]
            expected = total.split(sizes, dim)[rank]
            torch.testing.assert_close(comm.reduce_scatter(terms[rank], dim, sizes), expected, rtol=1e-13, atol=1e-13)
            ordered = terms[0].clone()
            for term in terms[1:]:
                ordered += term
            found = comm.reduce_scatter(terms[rank].T, dim, sizes, in_rank_order=True)
            same(found, ordered.T.split(sizes, dim)[rank])


@WORLDS
def test_reduce_scatter(world):
    run_ranks(world, reduce_scatters)


def ulysses(rank, world):
    """Tokens sharded [B, H, T_r, D] to heads sharded [B, H_r, T, D], and back."""
    comm = sp_of(world)
    tokens, heads = [5, 0, 3, 4][:world], [2, 1, 3, 0][:world]
    for dtype in MOVED:
        full = data(9, 2, sum(heads), sum(tokens), 4, dtype=dtype)
        by_token, by_head = full.split(tokens, 2), full.split(heads, 1)
        same(comm.all_to_all(by_token[rank], 1, 2, heads, tokens), by_head[rank])
        same(comm.all_to_all(by_head[rank], -2, 1, tokens, heads), by_token[rank])
    even = data(8, 2, 12, 12, 3)
    same(comm.all_to_all(even.chunk(world, 2)[rank], 1, 2), even.chunk(world, 1)[rank])


@WORLDS
def test_all_to_all_is_ulysses(world):
    run_ranks(world, ulysses)


def uneven_all_to_alls(rank, world):
    comm = sp_of(world)
    counts = [[(3 * sender + receiver * receiver) % 4 for receiver in range(world)] for sender in range(world)]
    for dtype in (torch.float32, torch.int16, torch.bool):
        sent = [data(sender, sum(counts[sender]), 2, dtype=dtype) for sender in range(world)]
        shapes = [(counts[sender][rank], 2) for sender in range(world)]
        arrived = comm.all_to_all_list(sent[rank].split(counts[rank]), shapes)
        for sender, chunk in enumerate(arrived):
            same(chunk, sent[sender].split(counts[sender])[rank])
    # Chunks of unlike shapes, some empty: rank r sends rank s a [r + 1, s] tensor.
    chunks = [torch.full((rank + 1, receiver), 10.0 * rank + receiver) for receiver in range(world)]
    arrived = comm.all_to_all_list(chunks, [(sender + 1, rank) for sender in range(world)])
    for sender, chunk in enumerate(arrived):
        same(chunk, torch.full((sender + 1, rank), 10.0 * sender + rank))


@WORLDS
def test_uneven_all_to_all(world):
    run_ranks(world, uneven_all_to_alls)


def broadcasts(rank, world):
    comm = sp_of(world)
    for src in range(world):
        for dtype in MOVED:
            sent = data(src, 3, 4, dtype=dtype).T
            mine = sent if rank == src else torch.zeros(4, 3, dtype=dtype)
            before = mine.clone()
            same(comm.broadcast(mine, src), sent)
            same(mine, before)
        value = comm.broadcast_object({"from": src, "long": "x" * 1000} if rank == src else None, src)
        assert value == {"from": src, "long": "x" * 1000}
    assert comm.all_gather_object(("rank", rank, [None] * rank)) == [("rank", r, [None] * r) for r in range(world)]
    comm.barrier()


@WORLDS
def test_broadcast_and_objects(world):
    run_ranks(world, broadcasts)


def rings(rank, world):
    comm = sp_of(world)

    def shard(owner):  # lengths differ, some are empty
        return [data(owner, owner % 3, 4), data(owner, owner % 3, dtype=torch.bool), data(7 + owner, 2, 3).T]

    held = shard(rank)
    for step in range(1, world + 1):
        source = (rank - step) % world
        shapes = [tensor.shape for tensor in shard(source)]
        held = comm.ring_shift(held, shapes).wait()
        for found, expected in zip(held, shard(source), strict=True):
            same(found, expected)
    for found, mine in zip(held, shard(rank), strict=True):
        same(found, mine)
    # Large enough not to fit any socket buffer, two under way at once.
    big = [torch.full((1 << 20,), float(rank)), torch.full((1 << 20,), rank, dtype=torch.int64)]
    first, second = comm.ring_shift(big), comm.ring_shift(big[::-1])
    assert second.wait()[0].unique().tolist() == [(rank - 1) % world]
    floats, integers = first.wait()
    assert floats.unique().tolist() == integers.unique().tolist() == [(rank - 1) % world]
    assert first.wait()[0] is floats


@WORLDS
def test_ring_shift(world):
    run_ranks(world, rings)


def on_every_axis(rank, world, sizes):
    mesh = build_mesh(**sizes)
    for name in ("dp", "sp", "tp", "request", "dp_sp", "world"):
        axis = mesh.axis(name)
        comm = Collectives(axis)
        assert comm.all_gather(torch.tensor([rank]), 0).tolist() == list(axis.ranks)
        assert comm.broadcast(torch.tensor([rank]), axis.size - 1).tolist() == [axis.ranks[-1]]
        (before,) = comm.ring_shift([torch.tensor(rank)]).wait()
        assert int(before) == axis.ranks[axis.rank - 1]
        comm.barrier()


@pytest.mark.parametrize("sizes", [{"sp": 2, "tp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "sp": 2}, {"tp": 3}])
def test_on_axes_that_are_not_the_world(sizes):
    world = 1
    for size in sizes.values():
        world *= size
    run_ranks(world, on_every_axis, sizes)


def test_local_axis_needs_no_process_group():
    comm = Collectives(ParallelMesh.local().axis("sp"))
    x = torch.arange(6.0).view(2, 3).T
    for found in (
        comm.all_reduce(x),
        comm.sum_in_rank_order(x),
        comm.all_gather(x, 1),
        comm.all_gather_uneven(x, 0),
        comm.reduce_scatter(x, 0),
        comm.all_to_all(x, 0, 1),
        comm.broadcast(x, 0),
        comm.ring_shift([x]).wait()[0],
        torch.tensor(comm.broadcast_object(x.tolist())),
        torch.tensor(comm.all_gather_object(x.tolist())[0]),
    ):
        assert torch.equal(found, x)
    comm.barrier()
    assert comm.counter.to_dict() == {}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.all_reduce(torch.ones(2), "mean"), ValueError, "op \\('mean'\\) must be one of"),
        (lambda c: c.all_reduce(torch.ones(2).bool()), TypeError, "cannot reduce torch.bool with sum"),
        (lambda c: c.sum_in_rank_order(torch.ones(2).to(torch.float8_e4m3fn)), TypeError, "cannot reduce torch.float8"),
        (lambda c: c.reduce_scatter(torch.ones(2, dtype=torch.int16), 0), TypeError, "cannot reduce torch.int16"),
        (lambda c: c.reduce_scatter(torch.ones(2), 0, [3]), ValueError, r"add up to 3 .* shape\[0\] \(2\)"),
        (lambda c: c.all_gather_uneven(torch.ones(2), 0, [3]), ValueError, r"sizes\[0\] \(3\) must be .* \(2\)"),
        (lambda c: c.all_gather_uneven(torch.ones(2), 0, [2, 1]), ValueError, r"sizes \(2\) .* sp \(1\)"),
        (lambda c: c.all_to_all(torch.ones(2, 2), 0, -2), ValueError, r"split_dim \(0\) and concat_dim \(0\)"),
        (lambda c: c.all_to_all(torch.ones(2, 2), 0, 1, None, [3]), ValueError, r"concat_sizes\[0\] \(3\) .* \(2\)"),
        (lambda c: c.all_to_all_list([torch.ones(2)], [(1,)]), ValueError, r"shapes\[0\] \(1,\)"),
        (lambda c: c.broadcast(torch.ones(2), 1), ValueError, r"src \(1\) must be in \[0, size \(1\)\)"),
        (lambda c: c.ring_shift([torch.ones(2)], []), ValueError, r"shapes \(0\) must be as many as tensors \(1\)"),
    ],
)
def test_misuse_is_refused_on_one_rank_too(call, error, message):
    with pytest.raises(error, match=message):
        call(Collectives(ParallelMesh.local().axis("sp")))


def indivisible(rank, world):
    comm = sp_of(world)
    with pytest.raises(ValueError, match=r"shape\[1\] \(5\) must be divisible by sp \(2\)"):
        comm.all_to_all(torch.ones(2, 5), 1, 0)
    with pytest.raises(ValueError, match=r"shape\[0\] \(3\) must be divisible by sp \(2\)"):
        comm.reduce_scatter(torch.ones(3), 0)


def test_what_does_not_divide_is_refused():
    run_ranks(2, indivisible)
