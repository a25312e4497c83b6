"""flash-attn 2 and 3 as the library calls them, over stand-ins of their signature; on a GPU, over what is installed."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from d2o_dist.kernels import registry
from d2o_dist.kernels.backend import set_backend
from d2o_dist.kernels.prefill_attention import cross_attention, naive_prefill_attention, prefill_attention
from d2o_dist.kernels.registry import OPS, Call
from d2o_dist.kernels.scored_prefill import naive_scored_prefill_attention
from tests.kernels import fake_flash_attn
from tests.kernels.choices import forget
from tests.kernels.helpers import HEADS, HEADS_IDS, make

NAMES = {2: ["flash_attn"], 3: ["flash_attn_interface"]}


@pytest.fixture
def install(monkeypatch):
    """install(*names): these packages can be imported, and CPU tensors count as their device's."""
    find, load = importlib.util.find_spec, importlib.import_module

    def install(*names: str, modules=fake_flash_attn.MODULES) -> None:
        fakes = tuple(fake_flash_attn.MODULES)

        def find_spec(name, *rest):
            return (name in names or None) if name in fakes else find(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(importlib, "import_module", lambda n, *a: modules[n] if n in fakes else load(n, *a))
        for op in (OPS["prefill_attention"], OPS["cross_attention"]):
            here = [replace(x, devices=("cuda", "cpu")) if x.kind == "package" else x for x in op.implementations]
            monkeypatch.setattr(op, "implementations", tuple(here))
        forget()
        fake_flash_attn.CALLS.clear()

    yield install
    monkeypatch.undo()
    forget()


def inputs(heads, q_start, tq, dtype=torch.bfloat16, device="cpu", dim=16):
    q = make(2, heads[0], tq, dim, dtype=dtype).to(device)
    k, v = (make(2, heads[1], q_start + tq, dim, dtype=dtype, seed=seed).to(device) for seed in (1, 2))
    return q, k, v


def assert_equal(found, expected, dtype):
    torch.testing.assert_close(found[0].cpu().double(), expected[0], atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(found[1].cpu().double(), expected[1], atol=1e-5, rtol=1e-5)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32 and found[1].is_contiguous()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize(("tq", "q_start"), [(1, 0), (33, 0), (7, 45), (1, 9)])
@pytest.mark.parametrize("window", [None, 1, 5, 500])
def test_prompts_chunks_and_windows(install, version, dtype, heads, tq, q_start, window):
    install(*NAMES[version])
    q, k, v = inputs(heads, q_start, tq, dtype)
    found = prefill_attention(q, k, v, 0.3, q_start=q_start, window=window)
    expected = naive_prefill_attention(*(x.double() for x in (q, k, v)), 0.3, q_start=q_start, window=window)
    assert_equal(found, expected, dtype)
    (call,) = fake_flash_attn.CALLS  # one, also for a chunk
    assert call["version"] == version and call["causal"] and call["queries"] == tq and call["keys"] == q_start + tq


@pytest.mark.parametrize("version", [2, 3])
def test_keys_before_all_queries(install, version):
    install(*NAMES[version])
    q, k, v = inputs((6, 2), 0, 33)
    found = cross_attention(q[:, :, :9], k, v, 0.3)
    keys, values = (x.double().repeat_interleave(3, 1) for x in (k, v))
    logits = q[:, :, :9].double() @ keys.mT * 0.3
    assert_equal(found, (logits.softmax(-1) @ values, logits.logsumexp(-1)), torch.bfloat16)
    assert [call["causal"] for call in fake_flash_attn.CALLS] == [False]


def test_the_newest_that_takes_the_inputs_is_chosen_and_named_once(install, caplog, monkeypatch):
    caplog.set_level(logging.INFO, registry.__name__)
    install("flash_attn", "flash_attn_interface")
    q, k, v = inputs((4, 2), 0, 9)
    prefill_attention(q, k, v, 0.3)
    prefill_attention(q, k, v, 0.3)
    for capability in (80, 75):  # version 3 has no kernels on the one, and neither version on the other
        monkeypatch.setattr("d2o_dist.kernels.launch.assumed_capability", capability)
        for op in OPS.values():
            op._picked.clear()
        prefill_attention(q, k, v, 0.3)
    assert [call["version"] for call in fake_flash_attn.CALLS] == [3, 3, 2]
    said = [record.getMessage().split(" are served by ") for record in caplog.records]
    served = ("flash-attn 3", "flash-attn 2", "cpu_prefill_attention")
    assert said == [["prefill_attention: cpu tensors", name] for name in served]


def test_what_it_does_not_take_goes_elsewhere(install):
    install("flash_attn")
    q, k, v = inputs((4, 2), 0, 9)
    prefill_attention(q, k, v, 0.3, bias=torch.zeros(2, 2, 9))
    prefill_attention(*inputs((4, 2), 0, 9, torch.float32), 0.3)
    prefill_attention(*inputs((4, 2), 0, 9, dim=12), 0.3)
    prefill_attention(*inputs((4, 2), 0, 9, dim=264), 0.3)
    prefill_attention(q.requires_grad_(), k, v, 0.3)
    q.requires_grad_(False)
    prefill_attention(q[:, :, :0], k, v, 0.3, q_start=9)
    for name in ("torch", "triton"):
        try:
            set_backend(name)
            prefill_attention(q, k, v, 0.3)
        finally:
            set_backend("auto")
    assert fake_flash_attn.CALLS == []


def test_packages_that_cannot_be_used_are_warned_of(install, caplog):
    def old(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        raise AssertionError("called")

    install(
        "flash_attn",
        "flash_attn_interface",
        modules={"flash_attn": SimpleNamespace(flash_attn_func=old), "flash_attn_interface": SimpleNamespace()},
    )
    prefill_attention(*inputs((4, 2), 0, 9), 0.3)
    assert ["cannot be used" in r.getMessage() for r in caplog.records] == [True, False]
    assert "flash_attn is too old to be used: flash_attn_func has no window_size" in caplog.text


def test_an_unknown_layout_of_the_lse_is_an_error(install):
    def strange(*args, **kwargs):
        out, lse, _ = fake_flash_attn.flash_attn_func_2(*args, **kwargs)
        return out, lse.transpose(1, 2), None

    strange.__signature__ = importlib.import_module("inspect").signature(fake_flash_attn.flash_attn_func_2)
    install("flash_attn", modules={"flash_attn": SimpleNamespace(flash_attn_func=strange)})
    with pytest.raises(RuntimeError, match=r"lse \(2, 9, 4\) torch.float32, not \(2, 4, 9\) torch.float32"):
        prefill_attention(*inputs((4, 2), 0, 9), 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("tq", "q_start", "window"), [(1, 0, None), (300, 0, None), (33, 200, None), (300, 77, 50)])
def test_the_package_itself(version, dtype, dim, tq, q_start, window):
    """What is installed on this machine, against the oracle."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v = inputs((8, 2), q_start, tq, dtype, "cuda", dim)
    call = Call(q.device, dtype, dim)
    whole, cross = (
        next(one for one in OPS[op].implementations if str(one) == f"flash-attn {version}")
        for op in ("prefill_attention", "cross_attention")
    )
    if why := whole.declines(call) or whole.lacks(q.device):
        pytest.skip(f"flash-attn {version}: {why}")
    scale = dim**-0.5
    wide = [x.cpu().double() for x in (q, k, v)]
    found = whole.load()(q, k, v, scale, q_start=q_start, window=window, bias=None)
    assert_equal(found, naive_prefill_attention(*wide, scale, q_start=q_start, window=window), dtype)
    logits = wide[0] @ wide[1].repeat_interleave(4, 1).mT * scale
    found = cross.load()(q, k, v, scale, bias=None)
    assert_equal(found, (logits.softmax(-1) @ wide[2].repeat_interleave(4, 1), logits.logsumexp(-1)), dtype)


def test_column_sums_follow_from_its_lse(install, monkeypatch):
    """On CUDA the sums are a second pass from the package's lse: here both are put together by hand."""
    from d2o_dist.kernels.column_sums import column_sums

    install("flash_attn")
    q, k, v = inputs((6, 2), 11, 40)
    _, lse = prefill_attention(q, k, v, 0.3, q_start=11)
    sums = column_sums(q, k, lse, 0.3, q_start=11)
    expected = naive_scored_prefill_attention(*(x.double() for x in (q, k, v)), 0.3, q_start=11)[2]
    torch.testing.assert_close(sums.double(), expected, atol=1e-4, rtol=1e-4)
