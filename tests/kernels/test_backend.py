import pytest
import torch

from d2o_dist.kernels import backend, launch, registry
from d2o_dist.kernels.backend import get_backend, set_backend
from d2o_dist.kernels.registry import OPS, Call

HALF_ON_CUDA = Call(torch.device("cuda"), torch.bfloat16, 64)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """The GPU that is assumed, and its packages."""
    monkeypatch.setattr(launch, "_capability_of_gpu", lambda device: 90)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    registry._say.cache_clear()
    yield
    registry._say.cache_clear()


def test_names():
    assert get_backend() == "auto"
    with pytest.raises(ValueError, match=r"'cudnn'.*auto, torch, triton"):
        set_backend("cudnn")
    assert get_backend() == "auto"


def test_triton_must_be_there(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        set_backend("triton")


def taken(op: str, call: Call = HALF_ON_CUDA) -> str:
    """Also says it, and imports nothing of Triton."""
    return OPS[op]._choose(call).__name__


def test_a_gpu_that_is_too_old_goes_without_kernels(monkeypatch, caplog):
    """Neither Triton nor PyTorch's flash kernel runs on it: both would end the first forward with an error."""
    assert taken("prefill_attention") == "cuda_prefill_attention"
    monkeypatch.setattr(launch, "_capability_of_gpu", lambda device: 75)
    assert taken("prefill_attention") == "blocked_prefill_attention"
    assert taken("column_sums") == "blocked_column_sums"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "7.5, and kernels need 8.0" in record.message


def test_without_triton_it_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    for op in ("column_sums", "column_sums", "nearest_kept"):
        assert taken(op).startswith("blocked")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CUDA tensors are served by slower PyTorch operators" in caplog.text


@pytest.mark.parametrize(
    "call",
    [
        HALF_ON_CUDA._replace(dtype=torch.float64),
        HALF_ON_CUDA._replace(head_dim=264),
        HALF_ON_CUDA._replace(gradient=True),
        HALF_ON_CUDA._replace(device=torch.device("cpu")),
    ],
)
def test_what_triton_would_not_serve_misses_nothing(monkeypatch, caplog, call):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert taken("column_sums", call) == "blocked_column_sums" and caplog.records == []


def test_flash_attn_is_not_missed(caplog):
    """It is no dependency: without it there is no warning."""
    assert taken("prefill_attention") == "cuda_prefill_attention" and caplog.records == []
