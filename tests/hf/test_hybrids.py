"""Models of which some layers attend and others keep a state: linear attention, Mamba, convolutions."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.models.hf.cache import D2OLayer
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.models.hf.shard import mark_replicas, shard_model
from tests.families import build, tiny_config
from tests.models import left_padded, tokens
from tests.oracle.naive_cache import OracleCache
from tests.oracle.naive_softmax import OracleSoftmax
from tests.ranks import run_ranks
from tests.spec import pair
from tests.tiny_types import CHANGES, class_of

# A gated delta rule; Mamba; Mamba 2 and layers that keep nothing; both in each layer; convolutions; latent attention.
TYPES = ("qwen3_next", "jamba", "nemotron_h", "falcon_h1", "lfm2", "kimi_linear")
PART = D2OConfig(keep_ratio=0.4, eviction_interval=3, budget={"min_layers": 0, "min_layer_tokens": 6})
FULL = D2OConfig(keep_ratio=1.0)


@cache
def model_of(model_type: str, attention: str = "d2o"):
    config = tiny_config(CONFIG_MAPPING[model_type], CHANGES.get(model_type))
    return build(class_of(model_type), config, attention)


def make(model, config: D2OConfig = PART) -> D2OCache:
    return D2OCache(config=model.config, d2o=config)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * float(expected.abs().max()))


@torch.no_grad()
def play(model, past, ids, mask=None, chunks=None, steps=5):
    """Logits after the prompt and after each of the steps, whose tokens are fixed: [B, 1 + steps, V]."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions, start, out = (mask.cumsum(1) - 1).clamp(min=0), 0, []
    for count in chunks or [ids.shape[1]]:
        here = slice(start, start + count)
        given = {"attention_mask": mask[:, : here.stop], "position_ids": positions[:, here]}
        out = [model(ids[:, here], past_key_values=past, **given).logits[:, -1]]
        start += count
    for step in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        given = {"attention_mask": mask, "position_ids": positions[:, -1:] + 1 + step}
        token = torch.full_like(ids[:, :1], 7 + 3 * step)
        out.append(model(token, past_key_values=past, **given).logits[:, -1])
    return torch.stack(out, 1)


@pytest.mark.parametrize("model_type", TYPES)
def test_rows_of_a_padded_batch_and_chunks_give_what_a_row_alone_gives(model_type):
    model, own = model_of(model_type), model_of(model_type, "sdpa")
    ids, mask = left_padded([31, 12], seed=4)
    alone = ids[1:, -12:]
    expected = play(own, DynamicCache(config=own.config), alone)
    near = 1e-5 if model_type == "kimi_linear" else 1e-6  # whose linear attention is float32: so far apart is `sdpa`
    # The first chunks hold nothing but padding of the second row. Jamba is read in one piece.
    for chunks in (None,) if model_type == "jamba" else (None, [9, 12, 10]):
        close(play(model, make(model, FULL), ids, mask, chunks)[1:], expected, near)
        close(play(model, make(model), ids, mask, chunks)[1:], play(model, make(model), alone), near)


@pytest.mark.parametrize("model_type", [one for one in TYPES if one != "jamba"])
def test_layers_that_attend_follow_the_oracle_over_chunks_and_a_later_turn(model_type, monkeypatch):
    """They alone are numbered: budgets, and protected layers, are theirs."""
    model = model_of(model_type)
    config, oracle_config = pair("d2o", keep_ratio=0.4, min_layer_tokens=6, eviction_interval=4)
    past = D2OCache(config=model.config, d2o=config)
    count, heads = len(past.shape.windows), past.shape.num_kv_heads
    oracle = OracleCache(oracle_config, count, past.shape.num_heads, heads)
    oracle.latent = past.shape.latent
    attend_layer, met = past.attend_layer, []

    def compare(layer, q, k, v, softmax, *others):
        step = q.shape[2] == 1
        if step and layer == 0:
            oracle.finalize()
            oracle.num_seen_tokens += 1
        expected = (oracle.decode_step if step else oracle.prefill_chunk)(
            layer, q[0], k[0], v[0], OracleSoftmax(softmax.scale)
        )
        if not step and layer == count - 1:
            oracle.finish_prefill_chunk(q.shape[2])
        found = attend_layer(layer, q, k, v, softmax, *others)
        torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-10)
        met.append(layer)
        return found

    monkeypatch.setattr(past, "attend_layer", compare)
    for seed in range(2):
        given = tokens(1, 29, seed) if seed == 0 else tokens(1, 11, seed)
        with torch.no_grad():
            for chunk in given.split(15, dim=1):
                model(chunk, past_key_values=past)
            for token in range(8):
                model(torch.tensor([[token + 3]]), past_key_values=past)
    assert met == list(range(count)) * (2 + 8 + 1 + 8)
    views = [layer for layer in past.layers if isinstance(layer, D2OLayer)]
    assert [layer.index for layer in views] == list(range(count)) and len(past.layers) >= count
    for layer, expected in zip(views, oracle.snapshot(), strict=True):
        assert torch.equal(layer.positions[0, :, : layer.kv_len[0]], expected["positions"])


@pytest.mark.parametrize("model_type", ["qwen3_next", "nemotron_h", "falcon_h1"])
def test_rows_that_come_go_and_pause_keep_their_state(model_type):
    model = model_of(model_type)
    batch, one = left_padded([23, 17, 14], seed=1), tokens(1, 19, seed=2)
    alone = {}
    for name, ids in {"a": batch[0][:1], "c": batch[0][2:, -14:], "d": one}.items():
        alone[name] = Session(model, PART)
        alone[name].prefill(ids, torch.ones_like(ids))
    both, new = Session(model, PART), Session(model, PART)
    both.prefill(*batch)
    new.prefill(one, torch.ones_like(one))

    def step(session, fed, present=None):
        return session.decode(fed, present)

    for number in range(4):  # "c" pauses in two of the steps
        here = number % 2 == 0
        logits = step(both, [11 + number, 5, 12 + number], [True, True, here])
        close(logits[0], step(alone["a"], [11 + number])[0])
        if here:
            close(logits[2], step(alone["c"], [12 + number])[0])
    both.keep_rows([2, 0])
    both.join(new)
    for number in range(3):
        logits = step(both, [21 + number, 31 + number, 41 + number])
        for row, (name, first) in enumerate([("c", 21), ("a", 31), ("d", 41)]):
            close(logits[row], step(alone[name], [first + number])[0])
    # A later turn of all of them, of one length.
    turn = tokens(3, 6, seed=9)
    logits = both.prefill(turn, torch.ones_like(turn))
    for row, name in enumerate("cad"):
        close(logits[row], alone[name].prefill(turn[row : row + 1], torch.ones(1, 6).long())[0])


def test_rows_that_generate_has_ended_keep_their_state():
    model = model_of("qwen3_next")
    ids = tokens(2, 15, seed=3)
    free = model.generate(ids, past_key_values=make(model), max_new_tokens=8, do_sample=False, eos_token_id=None)
    past, alone, end = make(model), make(model), int(free[0, 17])  # the third token of row 0
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    out = model.generate(ids, past_key_values=past, stopping_criteria=[past.ended_rows(end, 0)], **how)
    one = model.generate(ids[:1], past_key_values=alone, **how)
    assert torch.equal(one[0], out[0, :18]) and out.shape[1] > 19 and not out[0, 18:].any()
    seen, turn = past.get_seq_length(), tokens(2, 6, seed=4)
    mask = torch.ones(2, seen + 6, dtype=torch.long)
    mask[0, 18:seen] = 0
    positions = (mask.cumsum(1) - 1)[:, -6:]
    with torch.no_grad():  # alone, the last token was not fed
        model(torch.tensor([[end]]), past_key_values=alone)
        found = model(turn, attention_mask=mask, position_ids=positions, past_key_values=past).logits
        expected = model(turn[:1], past_key_values=alone).logits
    close(found[:1], expected)


def test_beams_reorder_states():
    model, own = model_of("qwen3_next"), model_of("qwen3_next", "sdpa")
    ids = tokens(2, 14, seed=6)
    how = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = own.generate(ids, **how)
    assert torch.equal(model.generate(ids, past_key_values=make(model, FULL), **how), expected)


def test_a_second_reading_leaves_states_as_they_are():
    model, ids = model_of("qwen3_next"), tokens(2, 24, seed=8)
    config, _ = pair("reread", keep_ratio=0.4, min_layer_tokens=6, reread_chunk=9)
    past, other = D2OCache(config=model.config, d2o=config), make(model, FULL)
    with torch.no_grad():
        model(ids, past_key_values=past)
        model(ids, past_key_values=other)
    past.reread(model, ids)
    for layer, linear in enumerate(past.states.is_linear):
        if linear:
            assert torch.equal(past.get_recurrent_state(layer), other.get_recurrent_state(layer))
            assert torch.equal(past.get_conv_state(layer), other.get_conv_state(layer))
    ragged = D2OCache(config=model.config, d2o=config)
    ids, mask = left_padded([12, 9])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=ragged)
    with pytest.raises(ValueError, match=r"prompts of \[12, 9\] tokens cannot be read a second time together"):
        ragged.reread(model, ids, mask)


def test_the_state_is_reported_and_in_no_ratio():
    model, ids = model_of("nemotron_h"), tokens(1, 40)
    past = make(model, FULL)
    assert past.report().state_bytes == 0
    with torch.inference_mode():
        model(ids, past_key_values=past)
    with torch.no_grad():  # what was made in inference mode is written outside of it
        model(ids[:, :1], past_key_values=past)
    report = past.report()
    states = [state for layer in past.states.layers for group in ("conv_states", "recurrent_states")
              for state in getattr(layer, group, {}).values()]  # fmt: skip
    assert report.state_bytes == sum(state.nbytes for state in states) > 0
    assert report.achieved_keep_ratio == 1 and report.held_bytes == report.full_bytes
    assert "of it states of other layers" in str(report) and len(report.layers) == 1
    past.reset()
    assert past.report().state_bytes == 0
    play(model, past, tokens(3, 9))  # a batch of another size


def on_ranks(rank, world):
    """Of each type the logits of a ragged prompt and of decode steps, in one of which a row pauses."""
    found = []
    for model_type in ("qwen3_next", "qwen3_5_text"):
        model, mesh = model_of.__wrapped__(model_type), build_mesh(tp=world)
        model = shard_model(model, mesh, ParallelConfig(tp=world, tp_engine="transformers"), torch.device("cpu"))
        session = Session(model, PART, mesh)
        logits = [session.prefill(*left_padded([21, 13], seed=5))]
        logits += [session.decode([3 + number, 9], [True, number != 1])[:1] for number in range(4)]
        found.append(torch.cat(logits))
    return found


@pytest.mark.multirank
def test_two_tensor_ranks_give_what_one_process_gives():
    expected = on_ranks(0, 1)
    for found in run_ranks(2, on_ranks, fresh=True):
        for mine, one in zip(found, expected, strict=True):
            close(mine, one, 1e-5)


def test_what_tensor_ranks_cannot_cut_is_refused():
    config = model_of("qwen3_next").config
    with pytest.raises(ValueError, match=r"tp_engine \(deepspeed\) cannot cut layers that keep a state.*transformers"):
        mark_replicas(config, ParallelConfig(tp=2, tp_engine="deepspeed"))
    with pytest.raises(ValueError, match="jamba has no tensor parallel plan: use dp instead"):
        mark_replicas(model_of("jamba").config, ParallelConfig(tp=2))
    with pytest.raises(ValueError, match="tp cannot cut kimi_linear: its layers of linear attention.*use dp instead"):
        mark_replicas(model_of("kimi_linear").config, ParallelConfig(tp=2, tp_engine="transformers"))


def test_what_states_cannot_follow_is_refused():
    model = model_of("falcon_h1")
    past = make(model)
    ids, mask = left_padded([9, 7])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=past)
        longer = torch.cat([mask, torch.tensor([[1, 1, 1], [0, 1, 1]])], 1)
        with pytest.raises(ValueError, match="row 1 has padding after its tokens, which layers of linear attention"):
            model(ids[:, :3], attention_mask=longer, past_key_values=past)
        with pytest.raises(ValueError, match="the cache was filled with batch size 2 and is now used with 1"):
            model(ids[:1, :1], past_key_values=past)
    past = make(model_of("jamba"))
    with torch.no_grad():
        model_of("jamba")(ids, past_key_values=past)
        with pytest.raises(ValueError, match="Mamba layers forget what was read where more than one token follows"):
            model_of("jamba")(ids[:, :2], past_key_values=past)
    with pytest.raises(ValueError, match=r"sp \(2\) cannot share a text to this model"):
        shape_of(model.config).check_sequence_ranks(ParallelConfig(sp=2).sp)
