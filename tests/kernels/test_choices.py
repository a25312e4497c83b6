"""What serves what: the table of choices, over every op and setting. Nothing of it may change unnoticed."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.choices import CALLS, Situation, chosen, machine

# T: Triton; B: PyTorch's operators, in blocks; C: the flash kernel of a CPU, or the fused pass; G: PyTorch's flash
# kernel on CUDA; 2, 3: flash-attn; !: refused; -: nothing to compute.
#
# column_sums, column_peaks, nearest_kept, merge_into, decode_attention, decode_with_logits, slot_probabilities,
# finish_decode | finish_decode: a total over ranks | scored_decode: with scores; without; peaks; a total over ranks;
# heads apart | scored_prefill | prefill_attention: whole; chunk; window; bias; window and bias | cross_attention:
# plain; bias
TABLE = [
    ("TTTTTTTT B TTTBT B GGTTT GT", dict()),
    ("TTTTTTTT B TTTBT B GGTTT GT", dict(dtype=torch.float16)),
    ("TTTTTTTT B TTTBT B BBBBB BB", dict(dtype=torch.float32)),
    ("BBBBBBBB B BBBBB B BBBBB BB", dict(dtype=torch.float64)),
    ("TTTTTTTT B TTTBT B GGTTT GT", dict(dim=60)),
    ("TTTTTTTT B TTTBT B GGTTT GT", dict(dim=256)),
    ("BBBBBBTB B BBBBB B BBBBB BB", dict(dim=257)),
    ("BBBBBBBB B BBBBB B G!BBB GT", dict(grad=True)),
    ("BBBBBBBB B BBBBB B BBBBB --", dict(batch=0)),
    ("BBBBBBBB B BBBBB B GGBBB GB", dict(backend="torch")),
    ("TTTTTTTT B TTTBT B TTTTT GT", dict(backend="triton")),
    ("BBBBBBBB B BBBBB B G!BBB GT", dict(backend="triton", grad=True)),
    ("TTTTTTTT B TTTBT B BBBBB BB", dict(backend="triton", dtype=torch.float32)),
    ("BBBBBBBB B BBBBB B BBBBB BB", dict(capability=75)),
    ("BBBBBBBB B BBBBB B GGBBB GB", dict(triton=False)),
    ("BBBBBBBB B BBBBB B BBBBB BB", dict(triton=False, dtype=torch.float32)),
    ("TTTTTTTT B TTTBT B 222TT 2T", dict(flash=(2,))),
    ("TTTTTTTT B TTTBT B 333TT 3T", dict(flash=(3,))),
    ("TTTTTTTT B TTTBT B 333TT 3T", dict(flash=(2, 3))),
    ("TTTTTTTT B TTTBT B 222TT 2T", dict(flash=(2, 3), capability=80)),
    ("TTTTTTTT B TTTBT B 222TT 2T", dict(flash=(2, 3), capability=100)),
    ("TTTTTTTT B TTTBT B GGTTT GT", dict(flash=(3,), capability=100)),
    ("BBBBBBBB B BBBBB B BBBBB BB", dict(flash=(2,), capability=75)),
    ("TTTTTTTT B TTTBT B GGTTT GT", dict(flash=(2,), dim=60)),
    ("BBBBBBTB B BBBBB B BBBBB BB", dict(flash=(2,), dim=264)),
    ("BBBBBBBB B BBBBB B G!BBB 2T", dict(flash=(2,), grad=True)),
    ("TTTTTTTT B TTTBT B BBBBB BB", dict(flash=(2,), dtype=torch.float32)),
    ("BBBBBBBB B BBBBB B GGBBB GB", dict(flash=(2,), backend="torch")),
    ("TTTTTTTT B TTTBT B TTTTT GT", dict(flash=(2,), backend="triton")),
    ("BBBBBBBB B BBBBB B 222BB 2B", dict(flash=(2,), triton=False)),
    ("BBBBBBBB B BBBBB C CCCCB CC", dict(device="cpu")),
    ("BBBBBBBB B BBBBB C CCCCB CC", dict(device="cpu", dtype=torch.float64)),
    ("BBBBBBBB B BBBBB C C!CBB CC", dict(device="cpu", grad=True)),
    ("BBBBBBBB B BBBBB B CCCCB --", dict(device="cpu", batch=0)),
    ("BBBBBBBB B BBBBB C CCCCB CC", dict(device="cpu", backend="torch")),
    ("BBBBBBBB B BBBBB C CCCCB CC", dict(device="cpu", backend="triton")),
    ("BBBBBBBB B BBBBB C CCCCB CC", dict(device="cpu", interpreted=True)),
    ("TTTTTTTT B TTTBT C TTTTT CT", dict(device="cpu", interpreted=True, backend="triton")),
    ("TTTTTTTT B TTTBT C CCCCB CC", dict(device="cpu", interpreted=True, backend="triton", dtype=torch.float32)),
    ("BBBBBBBB B BBBBB C C!CBB CT", dict(device="cpu", interpreted=True, backend="triton", grad=True)),
    ("BBBBBBBB B BBBBB B BBBBB BB", dict(device="meta")),
    ("TTTTTTTT B TTTBT B TTTTT BT", dict(device="meta", interpreted=True, backend="triton")),
]


@pytest.mark.parametrize(
    ("expected", "situation"), TABLE, ids=[" ".join(map(str, row.values())) or "CUDA" for _, row in TABLE]
)
def test_choice(expected, situation):
    with machine(described := Situation(**situation)):
        found = {op: chosen(op, described) for op in CALLS}
    assert found == dict(zip(CALLS, expected.replace(" ", ""), strict=True))
