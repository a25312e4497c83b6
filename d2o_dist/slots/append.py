"""Writing the tokens of a decode step into their slots."""

import torch
from torch import Tensor


@torch.no_grad()
def write_tokens(slot: Tensor, *pairs: tuple[Tensor, Tensor], masked: bool = False) -> None:
    """Write one slot a head of each buffer [B, Hkv, S, ...]; pairs: (buffer, what is written [B, Hkv, ...]).

    Args:
        slot: [B, Hkv] or [B, 1] int64; masked: it may be -1, and then nothing is written.
    """
    # Not scatter_: on a CPU that copies the whole buffer where its dtype is bfloat16.
    batch, heads = pairs[0][0].shape[:2]
    rows, of_head = torch.arange(batch, device=slot.device)[:, None], torch.arange(heads, device=slot.device)
    where = (rows, of_head, slot.clamp_min(0) if masked else slot)
    for buffer, new in pairs:
        if masked:
            stored = slot >= 0 if new.dim() == 2 else (slot >= 0).unsqueeze(-1)
            new = torch.where(stored, new, buffer[where])
        buffer[where] = new
