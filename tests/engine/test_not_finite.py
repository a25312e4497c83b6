"""Rows whose logits or attention are NaN or infinite end with an error of their own; the others are as without them."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch

from d2o_dist.cli import infer
from d2o_dist.comm import build_mesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine import runner as running
from d2o_dist.engine.loop import Running, generate
from d2o_dist.engine.plan import prepare
from d2o_dist.engine.records import to_line
from d2o_dist.engine.runner import run
from d2o_dist.engine.session import Session
from d2o_dist.engine.stepper import Stepper
from d2o_dist.fields.io import to_json
from d2o_dist.policy import PRESETS
from tests.engine.tape import TapeRecorder
from tests.engine.test_many_ranks import PATIENCE_S, read, write_config
from tests.engine.tiny import Numbers, make_folder, request
from tests.models import left_padded, tiny_model
from tests.ranks import run_ranks
from tests.spec import spec

PROMPTS = [51, 23, 38, 30]
BAD = 2
CONFIG = spec("mass", keep_ratio=0.3, min_layer_tokens=12)


@pytest.fixture(scope="module", params=["greedy", "drawn", "penalty"])
def sampling(request):
    values = {"greedy": {}, "drawn": {"temperature": 0.8, "seed": 3}, "penalty": {"repetition_penalty": 1.2}}
    return SamplingConfig(**values[request.param])


def requests() -> list:
    ids, mask = left_padded(PROMPTS, 1)
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    return [request(index, row, 12) for index, row in enumerate(rows)]


@contextmanager
def spoilt(session, module, at: int, bad: float = torch.nan, row: int = BAD):
    """From the forward of new token `at` on (1: the prompt's), the last column of a row is not finite."""
    count, decode = [1], session.decode

    def counted(*args):
        count[0] += 1
        return decode(*args)

    def hook(_, args, out):
        if count[0] < at:
            return None
        out = out.clone()
        out[row, -1].fill_(bad)
        return out

    session.decode, handle = counted, module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run_batch(model, sampling=None, recorder=None, spoil=lambda session: nullcontext()):
    session = Session(model, CONFIG)
    if recorder is not None:
        session._stepper = Stepper(session.model, recorder)
    with spoil(session):
        return generate(session, requests(), sampling or SamplingConfig(), Numbers()), session


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("at", "recorded"), [(1, False), (4, False), (1, True)])
def test_a_row_ends_with_an_error_and_the_others_go_on(sampling, bad, at, recorded):
    model = tiny_model()
    want, _ = run_batch(model, sampling)
    recorder = TapeRecorder() if recorded else None
    found, session = run_batch(model, sampling, recorder, lambda session: spoilt(session, model.lm_head, at, bad))
    lost = found.pop(BAD)
    want.pop(BAD)
    assert [row.tokens for row in found] == [row.tokens for row in want]
    assert [row.usage for row in found] == [row.usage for row in want]
    assert lost.error.startswith(f"the logits of new token {at}") and lost.finish_reason is None
    assert "keys or values from layer" not in lost.error and len(lost.tokens) == at - 1
    assert ("right after the prompt" in lost.error) == (at == 1)
    assert (session.num_replayed > 5) == recorded


@pytest.mark.parametrize("layer", [0, 2])
def test_the_first_layer_is_named(layer):
    model = tiny_model()
    found, _ = run_batch(model, spoil=lambda session: spoilt(session, model.model.layers[layer].mlp, 3))
    want, _ = run_batch(model)
    assert found[BAD].error.startswith(
        f"the logits of new token 3 are NaN or infinite, and keys or values from layer {layer + 1} on: weights"
    )
    assert [row.tokens for row in found[:BAD]] == [row.tokens for row in want[:BAD]]


def test_a_step_that_is_a_replay():
    """All rows at once, in a replay of what Python never sees again."""
    model = tiny_model()
    session = Session(model, CONFIG)
    session._stepper = Stepper(session.model, TapeRecorder())
    decode, count = session.decode, []

    def spoil(tokens, live):
        count.append(0)
        if len(count) == 5:
            model.model.norm.weight.data.fill_(torch.nan)
        return decode(tokens, live)

    session.decode = spoil
    found = generate(session, requests(), SamplingConfig(), Numbers())
    assert session.num_replayed == 4 and len(count) == 5
    assert all(row.error.startswith("the logits of new token 6 are NaN") and len(row.tokens) == 5 for row in found)


def test_the_host_waits_once_a_token(monkeypatch):
    """For the tokens; whether rows are lost comes with them."""
    waits = []

    def counting(name):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self: waits.append(name) or real(self))

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "nonzero"):
        counting(name)
    counts = []
    for new in (5, 15):
        model = tiny_model()
        session, waits[:] = Session(model, spec("full")), []
        session._stepper = Stepper(session.model, TapeRecorder())
        (row,) = generate(session, [request(0, requests()[0].input_ids, new)], SamplingConfig(), Numbers())
        assert len(row.tokens) == new
        counts.append(len(waits))
    assert counts[1] - counts[0] == 10


# ---- runs of one process -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"), num_attention_heads=8)


PLAIN = [{"id": f"r{n}", "prompt": "the quick brown fox jumps over the lazy dog " * (1 + n % 3)} for n in range(4)]
ROWS = [*PLAIN[:2], {"id": "bad", "prompt": "the quick brown fox jumps over"}, *PLAIN[2:]]


class Spoiler:
    """A run in which what a module gives for one row, that of the id `bad`, is not finite.

    Args:
        where: `lm_head`, or a number: that layer's feed-forward part.
        at: the new token (from 1) from whose forward on.
        ranks: those on which it happens; None: all.
    """

    def __init__(self, where: str | int, at: int, rank: int, ranks: list[int] | None) -> None:
        self.where, self.at, self.here = where, at, ranks is None or rank in ranks

    @contextmanager
    def installed(self):
        if not self.here:
            yield
            return
        real_load, real_read, real_step = running.loading.load_model, running.InferRunner.read, Running.step
        read_now, decoding = [], []

        def load(*args):
            adapter = real_load(*args)
            module = adapter.model.lm_head if self.where == "lm_head" else adapter.model.model.layers[self.where].mlp
            module.register_forward_hook(hook)
            return adapter

        def read(runner, requests):
            read_now[:] = [each.id for each in requests]
            batch = real_read(runner, requests)
            read_now.clear()
            return batch

        def step(batch):
            decoding.append(batch)
            ended = real_step(batch)
            decoding.clear()
            return ended

        def hook(_, args, out):
            """Of the row, in the prompts that are read or among the rows that decode."""
            rows = [(name, 1) for name in read_now]
            if decoding:
                rows = [(row.request.id, len(row.result.tokens) + 1) for row in decoding[0].rows]
            place, number = next(((place, new) for place, (name, new) in enumerate(rows) if name == "bad"), (0, 0))
            if number < self.at:
                return None
            out = out.clone()
            out[place, -1] = torch.nan
            return out

        with (
            patch.object(running.loading, "load_model", load),
            patch.object(running.InferRunner, "read", read),
            patch.object(Running, "step", step),
        ):
            yield


def values_of(folder, tmp_path, dp=1, sp=1, tp=1, **fields) -> dict:
    values = write_config(folder, tmp_path, dp, sp, tp, **fields)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return values | {"max_batch_size": 8}


def whole_run(rank, world, values, where, at, ranks):
    config = InferConfig.from_dict(values)
    parallel = config.parallel
    mesh = build_mesh(parallel.replicas(world), parallel.sp, parallel.tp)
    log: list[str] = []
    with Spoiler(where, at, rank, ranks).installed():
        summary = run(config, prepare(config, mesh), mesh, log=log.append)
    return (summary.num_ok, summary.num_failed), log


GREEDY = {"max_new_tokens": 8, "ignore_eos": True}
# Budgets by the attention of the prompt.
DYNAMIC = {"preset": "paper", "keep_ratio": 0.6, "budget": {"min_layer_tokens": 8}}


def check(values, where: str | int, at: int, want: list[dict]) -> dict:
    """The records are those of a run without the fault but for one; that one."""
    have = read(values["output"])
    (bad,) = [record for record in have if record["id"] == "bad"]
    assert [record for record in have if record["id"] != "bad"] == want
    assert bad["text"] is None and bad["finish_reason"] is None and bad["num_prompt_tokens"] > 0
    return bad


_sound: dict[str, list[dict]] = {}


def sound(values) -> list[dict]:
    """The records of one process without a fault, that row left out."""
    key = repr((values["model"], values["d2o"], values["sampling"]))
    if key not in _sound:
        run_ranks(1, whole_run, values | {"parallel": {}}, "lm_head", 99, [])
        _sound[key] = [record for record in read(values["output"]) if record["id"] != "bad"]
    return _sound[key]


@pytest.mark.parametrize(
    ("where", "at", "preset"), [("lm_head", 1, "d2o")] + [(0, at, preset) for at in (1, 4) for preset in PRESETS]
)
def test_every_preset_goes_on(folder, tmp_path, preset, where, at):
    d2o = {"preset": preset} | ({} if preset == "full" else {"keep_ratio": 0.6, "budget": {"min_layer_tokens": 8}})
    values = values_of(folder, tmp_path, sampling=GREEDY, d2o=d2o)
    want = sound(values)
    ((counts, log),) = run_ranks(1, whole_run, values, where, at, None)
    bad = check(values, where, at, want)
    assert counts == (4, 1) and any(f"row 2 ('bad') failed: {bad['error']}" == line for line in log)
    assert "not finite" in bad["error"]
    assert f"new token {at}" in bad["error"] or (at == 1 and "the prompt's attention is not finite in" in bad["error"])


def test_the_exit_status_and_the_record(folder, tmp_path, capsys):
    values = values_of(folder, tmp_path)
    flags = ["--model", values["model"], "--prompts", values["prompts"], "--output", values["output"]]
    with Spoiler("lm_head", 3, 0, None).installed():
        assert infer.main([*flags, "device=cpu", "sampling.max_new_tokens=5"]) == 1
    line = next(line for line in (tmp_path / "out.jsonl").read_text().splitlines() if '"bad"' in line)
    record = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert record["error"].startswith("the logits of new token 3 are NaN or infinite: weights")
    assert record["error"] in capsys.readouterr().err


# ---- ranks that share a request ------------------------------------------------------------------------------------

SHAPES = [(1, 2, 1), (1, 1, 2), (1, 2, 2)]
CASES = [(shape, on) for shape in SHAPES for on in ("all ranks", "the first", "the last")] + [((2, 1, 1), "all ranks")]


@pytest.mark.multirank
@pytest.mark.parametrize(("shape", "on"), CASES, ids=str)
@pytest.mark.parametrize("where", ["lm_head", 0])
def test_all_ranks_of_a_request_take_the_same_branch(folder, tmp_path, shape, where, on):
    """A row that breaks at its third token: on one rank only it is still an error, and nobody waits for anybody."""
    world = shape[0] * shape[1] * shape[2]
    values = values_of(folder, tmp_path, *shape, sampling=GREEDY)
    want = sound(values)
    ranks = {"all ranks": None, "the first": [0], "the last": [world - 1]}[on]
    many = run_ranks(world, whole_run, values, where, 3, ranks, timeout_s=PATIENCE_S, fresh=shape[2] > 1)
    assert {counts for counts, _ in many} == {(4, 1)}
    bad = check(values, where, 3, want)
    assert bad["error"].startswith("the logits of new token 3 are NaN or infinite")
    # One rank alone need not be the one that stores the token.
    if on == "all ranks":
        assert (", and keys or values from layer 1 on: weights" in bad["error"]) == (where == 0)


@pytest.mark.multirank
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("on", ["all ranks", "the last"])
def test_a_prompt_whose_attention_is_no_number(folder, tmp_path, shape, on):
    """Budgets by attention cannot be made for it. All ranks learn that together, and others go on."""
    values = values_of(folder, tmp_path, *shape, sampling=GREEDY, d2o=DYNAMIC)
    want = sound(values)
    ranks = None if on == "all ranks" else [1]
    many = run_ranks(2, whole_run, values, 0, 1, ranks, timeout_s=PATIENCE_S, fresh=shape[2] > 1)
    assert {counts for counts, _ in many} == {(4, 1)}
    bad = check(values, 0, 1, want)
    assert bad["error"].startswith("the prompt's attention is not finite in 1 of 2 layers, the first of them 1: ")
    assert "row 2 ('bad') failed: the prompt's attention" in many[0][1][0]


# ---- JSON ----------------------------------------------------------------------------------------------------------


def test_no_file_holds_what_json_has_not():
    with pytest.raises(FloatingPointError, match=r"value\.scores\.kl = nan is not a finite number"):
        to_line({"scores": {"nll": 1.0, "kl": float("nan")}})
    with pytest.raises(FloatingPointError, match=r"value\[1\]\.a = -inf"):
        to_json([1, {"a": float("-inf")}])
    assert to_json({"a": 1.5, "b": None}) == '{"a": 1.5, "b": null}'
