"""Tokens that attend to each other both ways (those of an image): attention, statistics and slots of the oracle."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.cache.order import Order
from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.core.softmax import Softmax
from tests.models import left_padded
from tests.oracle.naive_cache import OracleCache
from tests.oracle.naive_softmax import OracleSoftmax
from tests.spec import pair

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 2


class BothWays(OracleCache):
    """A token of a block sees up to the end of its block."""

    def __init__(self, config, last_seen: dict[int, int]) -> None:
        super().__init__(config, LAYERS, HEADS, KV_HEADS)
        self.last_seen = last_seen

    def _attend(self, layer, queries, positions, scaling):
        return super()._attend(layer, queries, [self.last_seen.get(one, one) for one in positions], scaling)


def numbers_of(lengths, blocks):
    """[B, T] of a batch padded on the left; blocks: [first, stop) of a row's tokens."""
    _, mask = left_padded(lengths)
    numbers = torch.full_like(mask, -1)
    for row, runs in enumerate(blocks):
        for number, (first, stop) in enumerate(runs):
            at = mask.shape[1] - lengths[row]
            numbers[row, at + first : at + stop] = number
    return numbers, mask


def states(batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        2 * torch.randn(batch, heads, length, DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


# In the middle and at the end, where rates are measured; next to each other; all of the prompt; none, and one token.
CASES = {
    "d2o": ([41, 33], [[(5, 14), (30, 41)], [(0, 33)]]),
    "mass": ([37, 20], [[(2, 9), (9, 20)], [(4, 5)]]),
    "paper_minmax": ([29, 40], [[], [(25, 36)]]),
    "snapkv": ([36, 25], [[(20, 36)], [(1, 24)]]),
    "sampled": ([39, 30], [[(2, 3), (7, 21), (36, 39)], [(9, 30)]]),
}


@pytest.mark.parametrize("columns", [29, 7, 1])
def test_layers_that_share_keys_see_in_blocks_what_their_owner_sees(columns):
    """The same queries, all or the last of them: in windows and without, in rows that are padded, over two chunks."""
    lengths, (config, _) = [58, 40, 11], pair("full")
    numbers, mask = numbers_of(lengths, [[(5, 14), (45, 58)], [(0, 11), (11, 22), (36, 39)], []])
    order = Order(2, (0, 1, 0), reads_prompts=columns == 29)
    cache = CompressedCache(config, [None, 31], order=order)
    for start in (0, 29):
        here, given = slice(start, start + 29), {}
        for layer in range(5):
            owner = order.owner(layer)
            q, k, v = given.setdefault(owner, states(3, 29, seed=start + layer))
            if layer > 1:
                q = q[:, :, -columns:]
            out = cache.attend(layer, q, k, v, Softmax(0.3), mask[:, : here.stop], blocks=numbers[:, here])
            if layer <= 1:
                given[owner, "out"] = out
            torch.testing.assert_close(out, given[owner, "out"][:, :, -q.shape[2] :])


SAMPLED = {"score_queries": "strided", "score_query_stride": 4, "score_near_distance": 3}


@pytest.mark.parametrize("preset", CASES)
@pytest.mark.parametrize("chunks", [None, [16, 13]])
def test_blocks_are_those_of_the_oracle(preset, chunks):
    lengths, blocks = CASES[preset]
    fields = {"keep_ratio": 0.4, "min_layer_tokens": 6, "eviction_interval": 3}
    config, oracle_config = pair("paper_minmax", **fields, **SAMPLED) if preset == "sampled" else pair(preset, **fields)
    width = max(lengths)
    chunks = [width] if chunks is None else [*chunks, width - sum(chunks)]
    numbers, mask = numbers_of(lengths, blocks)
    cache, oracles = CompressedCache(config, [None] * LAYERS), []
    for row, count in enumerate(lengths):  # a block is cut where a chunk ends
        seen, pad = {}, width - count
        edges = [sum(chunks[:index]) - pad for index in range(len(chunks) + 1)]
        for first, stop in blocks[row]:
            for start, end in zip(edges, edges[1:], strict=False):
                lo, hi = max(first, start), min(stop, end)
                seen |= {one: hi - 1 for one in range(lo, hi)}
        oracles.append(BothWays(oracle_config, seen))
    start = 0
    for chunk in chunks:
        here = slice(start, start + chunk)
        for layer in range(LAYERS):
            q, k, v = states(len(lengths), chunk, seed=100 * start + layer)
            out = cache.attend(layer, q, k, v, Softmax(0.3), mask[:, : here.stop], blocks=numbers[:, here])
            for row, oracle in enumerate(oracles):
                real = mask[row, here].bool()
                if real.any():
                    mine = (tensor[row][:, real] for tensor in (q, k, v))
                    wanted = oracle.prefill_chunk(layer, *mine, OracleSoftmax(0.3))
                    torch.testing.assert_close(out[row][:, real], wanted)
        for row, oracle in enumerate(oracles):
            if count := int(mask[row, here].sum()):
                oracle.finish_prefill_chunk(count)
        start += chunk
    cache.finalize()
    for row, oracle in enumerate(oracles):
        oracle.finalize()
        for layer, expected in enumerate(oracle.snapshot()):
            held = cache.layers[layer].slots
            kept = cache.layers[layer].kv_len[row]
            assert torch.equal(held.positions[row, :, :kept], expected["positions"])
            torch.testing.assert_close(held.keys[row, :, :kept], expected["keys"])
            if config.needs_rates:
                torch.testing.assert_close(held.rates[row, :, :kept], expected["rates"])


@pytest.mark.parametrize("block", [(3, 8), (2, 19), (10, 24)])
def test_a_window_holds_inside_a_block_too(block):
    """It cuts what lies before, not after: key > query - window."""
    window, length = 6, 24
    config, _ = pair("d2o", keep_ratio=0.5, min_layer_tokens=2)
    cache = CompressedCache(config, [None, window])
    numbers, _ = numbers_of([length], [[block]])
    for layer in range(2):
        q, k, v = states(1, length, seed=layer)
        out = cache.attend(layer, q, k, v, Softmax(0.3), None, blocks=numbers)
    at = torch.arange(length)
    seen = at <= at[:, None]
    seen[block[0] : block[1], block[0] : block[1]] = True
    seen &= at > at[:, None] - window
    keys, values = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (k, v))
    expected = (q @ keys.mT * 0.3).masked_fill(~seen, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(out, expected)


def test_what_blocks_cannot_be_with():
    q, k, v = states(1, 9, seed=0)
    numbers = torch.tensor([[0, 0, -1, 0, 0, -1, -1, -1, -1]])
    config, _ = pair("d2o", keep_ratio=0.5, min_layer_tokens=2)
    with pytest.raises(ValueError, match=r"have others amid them \(block 0, again from token 3 of the chunk\)"):
        CompressedCache(config, [None]).attend(0, q, k, v, Softmax(0.3), None, blocks=numbers)
