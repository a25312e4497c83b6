"""What this device can do, measured: a copy and a matmul; and what each op must at least move and multiply."""

from dataclasses import dataclass

import torch

from benchmarks.timing import interleaved_medians


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second read and written by a copy, and floating point operations a second of a square matmul."""

    copy_bytes: float
    matmul_flops: float


@dataclass(frozen=True)
class Work:
    """The least bytes that must move between memory and processor, and the operations of the matmuls."""

    num_bytes: float
    flops: float

    def share(self, seconds: float, ceilings: Ceilings) -> dict[str, str]:
        """Per cent of each measured ceiling that was reached: the larger one says what bounds the op."""
        return {
            "% of copy": f"{100 * self.num_bytes / seconds / ceilings.copy_bytes:.0f}",
            "% of matmul": f"{100 * self.flops / seconds / ceilings.matmul_flops:.0f}",
        }


def measure_ceilings(
    device: str, dtype: torch.dtype, *, clock: str = "wall", copy_mib: int = 0, size: int = 0
) -> Ceilings:
    """A copy between two tensors larger than the caches, and a matmul of `size`; sizes fit the device by default."""
    on_gpu = torch.device(device).type == "cuda"
    copy_mib, size = copy_mib or (1024 if on_gpu else 128), size or (8192 if on_gpu else 1024)
    source = torch.ones(copy_mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = interleaved_medians({"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}, 5, clock)
    return Ceilings(2 * source.numel() / seconds["copy"], 2 * size**3 / seconds["matmul"])


def decode_work(heads: tuple[int, int], head_dim: int, slots: int, itemsize: int) -> Work:
    """One step over `slots` slots: K and V once; two matmuls."""
    return Work(2 * heads[1] * slots * head_dim * itemsize, 4 * heads[0] * slots * head_dim)


def prefill_work(heads: tuple[int, int], head_dim: int, length: int, itemsize: int, *, matmuls: int = 2) -> Work:
    """Causal attention: Q, K, V and the output once; half of `matmuls` dense ones (2: attention, 1: column sums)."""
    pairs = length * (length + 1) / 2
    return Work((2 * heads[0] + 2 * heads[1]) * length * head_dim * itemsize, 2 * matmuls * heads[0] * pairs * head_dim)


def nearest_work(num_kv_heads: int, head_dim: int, evicted: int, kept: int, itemsize: int) -> Work:
    """All cosines of evicted and kept keys: both once; one matmul."""
    return Work(num_kv_heads * (evicted + kept) * head_dim * itemsize, 2.0 * num_kv_heads * evicted * kept * head_dim)


def merge_work(num_kv_heads: int, head_dim: int, merged: int, kept: int, itemsize: int) -> Work:
    """Keys and values: kept rows read and written, merged rows read; two operations a number."""
    return Work(2 * num_kv_heads * (merged + 2 * kept) * head_dim * itemsize, 4.0 * num_kv_heads * merged * head_dim)
