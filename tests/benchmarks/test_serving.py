"""The table of what serves what, for GPUs that are only described."""

import pytest
import torch

from benchmarks.serving import serving
from d2o_dist.kernels import backend, launch
from d2o_dist.kernels.registry import OPS

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(launch, "_capability_of_gpu", lambda device: 80)


def table(device: str, *dtypes: torch.dtype, **more) -> dict:
    rows = serving(device, dtypes or DTYPES, **more)
    return {(row["op"], row["with"], row["dtypes"]): (row["taken"], row["passed over"]) for row in rows}


def test_every_op_is_told_with_reasons():
    found = table("cuda")
    assert {op for op, _, _ in found} == set(OPS)
    assert found["column_sums", "", "float32, bfloat16"] == ("triton_column_sums", "")
    taken, passed = found["prefill_attention", "window", "bfloat16"]
    assert taken == "triton_prefill_attention"
    assert passed.startswith("flash-attn 3: the GPU has compute capability 8.0, and kernels need 9.0; flash-attn 2: ")
    assert passed.endswith("cuda_prefill_attention: window")
    assert found["cross_attention", "bias", "float32"][0] == "blocked_cross_attention"
    assert found["scored_decode", "total", "float32, bfloat16"] == ("by_probabilities", "triton_scored_decode: total")


def test_machine_backend_and_head_dim_count(monkeypatch):
    assert table("cpu")["column_sums", "", "float32, bfloat16"][1] == (
        "triton_column_sums: device cpu; banded_column_sums: no narrow"
    )
    assert table("cuda", head_dim=512)["nearest_kept", "", "float32, bfloat16"] == (
        "blocked_nearest_kept", "triton_nearest_of_targets: head dim 512",
    )  # fmt: skip
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert table("cuda")["merge_into", "", "float32, bfloat16"] == (
        "blocked_merge_into", "triton_merge_into: triton is not installed",
    )  # fmt: skip
    monkeypatch.setattr(backend, "_chosen", "torch")
    assert table("cuda")["merge_into", "", "float32, bfloat16"] == ("blocked_merge_into", "")
