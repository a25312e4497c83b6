import pytest
import torch

from d2o_dist.kernels import backend
from d2o_dist.kernels.backend import get_backend, set_backend, takes_triton
from d2o_dist.kernels.prefill_attention.cuda import cuda_supports


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """What GPU the stand-ins lie on."""
    monkeypatch.setattr(backend, "capability", lambda device: 90)


def test_names():
    assert get_backend() == "auto"
    with pytest.raises(ValueError, match=r"'cudnn'.*auto, torch, triton"):
        set_backend("cudnn")
    assert get_backend() == "auto"


def test_triton_must_be_there(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        set_backend("triton")


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    device = torch.device("cuda")

    def __init__(self, dtype=torch.bfloat16, requires_grad=False):
        self.dtype, self.requires_grad = dtype, requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_choice_by_dtype(monkeypatch, dtype):
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    assert takes_triton(OnCuda(dtype)) == (dtype != torch.float64)
    assert not takes_triton(torch.zeros(1, dtype=dtype))


def test_choice_by_head_dim_gradient_and_setting(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    assert takes_triton(OnCuda(), head_dim=256) and not takes_triton(OnCuda(), head_dim=257)
    assert not takes_triton(OnCuda(), OnCuda(requires_grad=True))
    with torch.no_grad():
        assert takes_triton(OnCuda(requires_grad=True))
    monkeypatch.setattr(backend, "_chosen", "torch")
    assert not takes_triton(OnCuda())


def test_a_gpu_that_is_too_old_goes_without_kernels(monkeypatch, caplog):
    """Neither Triton nor PyTorch's flash kernel runs on it: both would end the first forward with an error."""
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    queries = torch.empty(1, 2, 3, 64, dtype=torch.float16)
    on_gpu = type("OnGpu", (OnCuda,), {"shape": queries.shape, "numel": queries.numel})(torch.float16)
    assert takes_triton(on_gpu) and cuda_supports(on_gpu, None)
    monkeypatch.setattr(backend, "capability", lambda device: 75)
    backend._say.cache_clear()
    assert not takes_triton(on_gpu) and not cuda_supports(on_gpu, None)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "7.5, and kernels need 8.0" in record.message


def test_without_triton_it_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    backend._say.cache_clear()
    assert not takes_triton(OnCuda()) and not takes_triton(OnCuda())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
