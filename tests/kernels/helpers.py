"""Random attention inputs, and the tolerances that the kernel tests share."""

import torch
from torch import Tensor

# (absolute, relative) against an oracle run in float64 on the same (already rounded) inputs. CPU flash's lse is off by
# up to 1e-4 in bf16, and its output is rounded to bf16 (8 bits); in float32 a sum over 1000s of terms is good to 1e-5.
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 1e-2)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
DTYPE_IDS = ["float64", "float32", "bfloat16"]
HEADS = [(4, 4), (8, 2), (6, 1)]  # MHA, GQA, MQA
HEADS_IDS = ["mha", "gqa", "mqa"]


def make(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)
