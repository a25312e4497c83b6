"""One decode step of a layer against its oracle; what unused slots hold must be finite, but may be anything else."""

import pytest
import torch

from d2o_dist.kernels.finish_decode import pace_of
from d2o_dist.kernels.scored_decode import naive_scored_decode, scored_decode, scored_decode_steps
from d2o_dist.kernels.scored_decode.cpu import bias_of
from d2o_dist.kernels.scored_decode.steps import RowSteps
from d2o_dist.slots.tables import Tables
from tests.kernels.helpers import DTYPE_IDS, DTYPES, HEADS, HEADS_IDS, assert_near, make


def case(heads, dtype, apart=False, slots=37, dim=16):
    """Three rows that hold 21, 1 and all but one of their slots; the new token of each is the last.

    apart: slots of the heads lie in other orders, and so do the free ones between them.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    q = make(3, heads[0], dim, dtype=dtype)
    k, v = (make(3, heads[1], slots, dim, dtype=dtype, seed=s) for s in (1, 2))
    newest = torch.tensor([[20], [0], [slots - 2]])
    valid = torch.arange(slots) <= newest
    if apart:
        order = torch.stack([torch.arange(slots).flip(0).roll(5 * head) for head in range(heads[1])]).expand(3, -1, -1)
        newest = (order == newest.unsqueeze(-1)).int().argmax(-1)
        valid = valid.unsqueeze(1).expand_as(order).gather(-1, order)
    by_head = valid if apart else valid.unsqueeze(1)
    for x in (k, v):
        x.masked_fill_(~by_head.unsqueeze(-1), 1e4)
    statistics = [make(3, heads[1], slots, dtype=exact, seed=s).abs() * by_head for s in (3, 4, 5)]
    return (q, k, v, 0.3), dict(valid=valid, newest=newest), statistics


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize("parts", ["", "s", "r", "srm", "p", "prm"])
@pytest.mark.parametrize("absent", [False, True], ids=["all", "absent"])
@pytest.mark.parametrize("apart", [False, True], ids=["level", "apart"])
def test_equals_naive(dtype, heads, parts, absent, apart):
    tensors, options, (scores, rates, mass) = case(heads, dtype, apart)
    options |= dict(log_mass=mass if "m" in parts else None, rate_window=8)
    options["present"] = torch.tensor([True, False, True]) if absent else None
    options["peaks"] = "p" in parts
    kept = {"scores": scores if set("sp") & set(parts) else None, "rates": rates if "r" in parts else None}
    expected = {name: None if x is None else x.clone() for name, x in kept.items()}
    out = scored_decode(*tensors, **options, **kept)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in tensors]
    assert out.dtype == dtype
    assert_near(out, naive_scored_decode(*wide, **options, **expected), dtype)
    for name, want in expected.items():
        if want is not None:
            assert_near(kept[name], want, want.dtype)
            by_head = options["valid"] if apart else options["valid"].unsqueeze(1)
            assert not kept[name].masked_select(~by_head).any()
    if absent:
        assert not out[1].any()
        assert kept["scores"] is None or torch.equal(scores[1], case(heads, dtype, apart)[2][0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
def test_a_row_gets_what_it_gets_alone(dtype, heads):
    """To the last bit, however wide the widest row is."""
    (q, k, v, scale), options, (scores, rates, mass) = case(heads, dtype, slots=601)
    newest, valid = torch.tensor([[20], [0], [599]]), torch.arange(601) <= torch.tensor([[20], [0], [599]])
    widths, alone = [21, 1, 601], [scores.clone(), rates.clone()]
    both = dict(scores=scores, rates=rates, log_mass=mass, rate_window=8)
    out = scored_decode(q, k, v, scale, valid=valid, newest=newest, widths=widths, **both)
    for row, width in enumerate(widths):
        here = slice(row, row + 1)
        own = [tensor[here, :, :width].clone() for tensor in (k, v, mass, *alone)]
        got = scored_decode(
            q[here], *own[:2], scale, valid=valid[here, :width], newest=newest[here], widths=[width],
            scores=own[3], rates=own[4], log_mass=own[2], rate_window=8,
        )  # fmt: skip
        assert torch.equal(got[0], out[row])
        assert torch.equal(own[3], scores[here, :, :width]) and torch.equal(own[4], rates[here, :, :width])


def test_probabilities_may_be_completed_by_others():
    """Two holders of one KV head, each with some of its query heads: together they score what one would."""
    (q, k, v, scale), options, (scores, rates, _) = case((8, 2), torch.float64)
    whole = [scores.clone(), rates.clone()]
    scored_decode(q, k, v, scale, scores=whole[0], rates=whole[1], **options)
    halves = [q.unflatten(1, (2, 4))[:, :, part].flatten(1, 2) for part in (slice(0, 2), slice(2, 4))]
    probs = []
    for half in halves:
        scored_decode(half, k, v, scale, scores=scores.clone(), total=lambda x: probs.append(x.clone()) or x, **options)
    scored_decode(halves[0], k, v, scale, scores=scores, rates=rates, total=lambda x: probs[0] + probs[1], **options)
    torch.testing.assert_close(scores, whole[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(rates, whole[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize("parts", ["", "r", "srm", "prm"])
@pytest.mark.parametrize("extra", ["", "absent", "softcap, sinks", "one row, total"])
def test_steps_over_the_same_buffers(dtype, heads, parts, extra, monkeypatch):
    """Each as one step of its own: tokens, tables and who is present are written in place."""
    monkeypatch.setattr("d2o_dist.kernels.scored_decode.cpu.CONVERTED_ELEMENTS", 16 * heads[1] * 16)  # spans in bf16
    (q, k, v, scale), _, statistics = case(heads, dtype)
    rows, (_, slots, dim) = 1 if "one row" in extra else 3, k.shape[1:]
    q, k, v, *statistics = (tensor[:rows].contiguous() for tensor in (q, k, v, *statistics))
    held, widths = [20, 0, 34][:rows], [slots, 5, 36][:rows]
    scores, rates, mass = (one * (torch.arange(slots) < torch.tensor(held)[:, None, None]) for one in statistics)
    options = dict(rate_window=8, peaks="p" in parts, log_mass=mass if "m" in parts else None, widths=widths,
                   softcap=2.0 if "softcap" in extra else None, sinks=None, total=None)  # fmt: skip
    if "sinks" in extra:
        options["sinks"] = make(1, heads[0], dtype=torch.float32, seed=7)
    if "total" in extra:
        options["total"] = lambda probs: probs * 2
    options["present"] = torch.ones(rows, dtype=torch.bool) if extra == "absent" else None
    names = [name for name, part in (("scores", "sp"), ("rates", "r")) if set(part) & set(parts)]
    mine = {"scores": None, "rates": None} | {name: dict(scores=scores, rates=rates)[name] for name in names}
    keys, values, wanted = k.clone(), v.clone(), {name: None if x is None else x.clone() for name, x in mine.items()}
    live = torch.arange(slots) < torch.tensor(held)[:, None, None].expand(-1, heads[1], 1)
    newest = torch.tensor(held)[:, None].expand(-1, heads[1]).clone()
    tables = Tables(torch.empty(rows * heads[1], dtype=torch.int64), torch.empty_like(mass), torch.empty_like(mass))
    run = scored_decode_steps(q, k, v, scale, tables=tables, valid=live, newest=newest, **mine, **options)
    assert isinstance(run, RowSteps)
    for step in range(3):
        if options["present"] is not None:
            options["present"][1] = step == 1
        here = torch.ones(rows, dtype=torch.bool) if options["present"] is None else options["present"]
        live |= (torch.arange(slots) == newest.unsqueeze(-1)) & here[:, None, None]
        tables.place.copy_((torch.arange(rows * heads[1]).view(rows, -1) * slots + newest).flatten())
        tables.bias.copy_(bias_of(live, options["log_mass"], live.shape, mass.dtype))
        tables.pace.copy_(pace_of(mass, newest, 8, options["present"]))
        q = make(rows, heads[0], dim, dtype=dtype, seed=10 + step)
        new = [make(rows, heads[1], dim, dtype=dtype, seed=20 + step), make(rows, heads[1], dim, dtype=dtype, seed=30)]
        out = run(q, tuple(new))
        want = scored_decode(q, keys, values, scale, valid=live, newest=newest, new=tuple(new), **wanted, **options)
        assert torch.equal(out, want) and out.dtype == dtype
        assert torch.equal(k, keys) and torch.equal(v, values)
        for name, one in wanted.items():
            assert one is None or torch.equal(mine[name], one)
        newest += here[:, None]


def test_steps_without_tables_are_steps_of_their_own():
    (q, k, v, scale), options, (scores, rates, mass) = case((4, 2), torch.float32)
    kept = dict(scores=scores, rates=rates)
    wanted, options = {name: x.clone() for name, x in kept.items()}, options | dict(log_mass=mass)
    newest = options.pop("newest").expand(-1, 2)
    rest = dict(newest=newest, softcap=None, sinks=None, peaks=False, rate_window=8, present=None, widths=None)
    run = scored_decode_steps(q, k, v, scale, tables=None, total=None, **options, **rest, **kept)
    new = tuple(make(3, 2, 16, dtype=torch.float32, seed=seed) for seed in (8, 9))
    keys, values = k.clone(), v.clone()
    want = scored_decode(q, keys, values, scale, new=new, **options, **rest, **wanted)
    assert torch.equal(run(q, new), want) and torch.equal(k, keys) and not isinstance(run, RowSteps)
    assert all(torch.equal(kept[name], wanted[name]) for name in kept)
