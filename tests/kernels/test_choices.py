"""What serves what: the table of choices, over every op and setting. Nothing of it may change unnoticed."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.choices import CALLS, Situation, chosen, machine

# T: Triton; B: PyTorch's operators, in blocks; C: the flash kernel of a CPU, or the fused pass; G: PyTorch's flash
# kernel on CUDA; 2, 3: flash-attn; !: refused; -: nothing to compute.
#
# column_sums, column_peaks, nearest_kept, merge_into, decode_attention, decode_with_logits, slot_probabilities,
# update_scores | scored_decode: with scores; without; peaks; a total over ranks | scored_prefill | prefill_attention:
# whole; chunk; window; bias; window and bias | cross_attention: plain; bias
TABLE = [
    ("TTTTTTTT TBBB B GGTTT GT", dict()),
    ("TTTTTTTT TBBB B GGTTT GT", dict(dtype=torch.float16)),
    ("TTTTTTTT TBBB B BBBBB BB", dict(dtype=torch.float32)),
    ("BBBBBBBB BBBB B BBBBB BB", dict(dtype=torch.float64)),
    ("TTTTTTTT TBBB B GGTTT GT", dict(dim=60)),
    ("TTTTTTTT TBBB B GGTTT GT", dict(dim=256)),
    ("BBBBBBTT BBBB B BBBBB BB", dict(dim=257)),
    ("BBBBBBBB BBBB B G!BBB GT", dict(grad=True)),
    ("BBBBBBBB TBBB B BBBBB --", dict(batch=0)),
    ("BBBBBBBB BBBB B GGBBB GB", dict(backend="torch")),
    ("TTTTTTTT TBBB B TTTTT GT", dict(backend="triton")),
    ("BBBBBBBB BBBB B G!BBB GT", dict(backend="triton", grad=True)),
    ("TTTTTTTT TBBB B BBBBB BB", dict(backend="triton", dtype=torch.float32)),
    ("BBBBBBBB BBBB B BBBBB BB", dict(capability=75)),
    ("BBBBBBBB BBBB B GGBBB GB", dict(triton=False)),
    ("BBBBBBBB BBBB B BBBBB BB", dict(triton=False, dtype=torch.float32)),
    ("TTTTTTTT TBBB B 222TT 2T", dict(flash=(2,))),
    ("TTTTTTTT TBBB B 333TT 3T", dict(flash=(3,))),
    ("TTTTTTTT TBBB B 333TT 3T", dict(flash=(2, 3))),
    ("TTTTTTTT TBBB B 222TT 2T", dict(flash=(2, 3), capability=80)),
    ("TTTTTTTT TBBB B 222TT 2T", dict(flash=(2, 3), capability=100)),
    ("TTTTTTTT TBBB B GGTTT GT", dict(flash=(3,), capability=100)),
    ("BBBBBBBB BBBB B BBBBB BB", dict(flash=(2,), capability=75)),
    ("TTTTTTTT TBBB B GGTTT GT", dict(flash=(2,), dim=60)),
    ("BBBBBBTT BBBB B BBBBB BB", dict(flash=(2,), dim=264)),
    ("BBBBBBBB BBBB B G!BBB 2T", dict(flash=(2,), grad=True)),
    ("TTTTTTTT TBBB B BBBBB BB", dict(flash=(2,), dtype=torch.float32)),
    ("BBBBBBBB BBBB B GGBBB GB", dict(flash=(2,), backend="torch")),
    ("TTTTTTTT TBBB B TTTTT GT", dict(flash=(2,), backend="triton")),
    ("BBBBBBBB BBBB B 222BB 2B", dict(flash=(2,), triton=False)),
    ("BBBBBBBB BBBB C CCCCB CC", dict(device="cpu")),
    ("BBBBBBBB BBBB C CCCCB CC", dict(device="cpu", dtype=torch.float64)),
    ("BBBBBBBB BBBB C C!CBB CC", dict(device="cpu", grad=True)),
    ("BBBBBBBB BBBB B CCCCB --", dict(device="cpu", batch=0)),
    ("BBBBBBBB BBBB C CCCCB CC", dict(device="cpu", backend="torch")),
    ("BBBBBBBB BBBB C CCCCB CC", dict(device="cpu", backend="triton")),
    ("BBBBBBBB BBBB C CCCCB CC", dict(device="cpu", interpreted=True)),
    ("TTTTTTTT TBBB C TTTTT CT", dict(device="cpu", interpreted=True, backend="triton")),
    ("TTTTTTTT TBBB C CCCCB CC", dict(device="cpu", interpreted=True, backend="triton", dtype=torch.float32)),
    ("BBBBBBBB BBBB C C!CBB CT", dict(device="cpu", interpreted=True, backend="triton", grad=True)),
    ("BBBBBBBB BBBB B BBBBB BB", dict(device="meta")),
    ("TTTTTTTT TBBB B TTTTT BT", dict(device="meta", interpreted=True, backend="triton")),
]


@pytest.mark.parametrize(
    ("expected", "situation"), TABLE, ids=[" ".join(map(str, row.values())) or "CUDA" for _, row in TABLE]
)
def test_choice(expected, situation):
    with machine(described := Situation(**situation)):
        found = {op: chosen(op, described) for op in CALLS}
    assert found == dict(zip(CALLS, expected.replace(" ", ""), strict=True))
