"""A Megatron `GPTModel` as the losses of training see a model: hidden states under a pass, and an output head.

Shape legend: B rows, t tokens of a row at this rank, H hidden dim, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from d2o_dist.comm.collectives import Collectives
from d2o_dist.models.megatron.attention import Forward
from d2o_dist.models.megatron.model import check_served, frequencies, hidden_states, tensor_ranks


class TrainableGPT(nn.Module):
    """What `train.objective.Objective` asks of a causal language model.

    Megatron's `DistributedDataParallel`, over the same `GPTModel`, and its optimizer train the weights. Losses are sums
    over the tokens at a rank, so gradients must be added over context ranks: `calculate_per_token_loss` of the
    configuration must be true. No layer may be computed again in the backward pass.

    Args:
        model: the model, whose layers come from `with_cache(spec)`.
        vocab_size: ids that are tokens.

    Raises:
        ValueError: see `MegatronModel`; `calculate_per_token_loss` is false, activations are recomputed, dropout, or KV
            heads of which not all ranks have equally many of their own.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        super().__init__()
        check_served(model)
        config = model.config
        for name, wanted in (("calculate_per_token_loss", True), ("recompute_granularity", None),
                             ("hidden_dropout", 0.0), ("attention_dropout", 0.0)):  # fmt: skip
            if getattr(config, name) != wanted:
                raise ValueError(f"{name} ({getattr(config, name)}) must be {wanted}, to distill under compression")
        tp = parallel_state.get_tensor_model_parallel_world_size()
        cp = parallel_state.get_context_parallel_world_size()
        if config.num_query_groups % (tp * cp):
            raise ValueError(f"num_query_groups ({config.num_query_groups}) must be divisible by tensor ({tp}) x "
                             f"context ({cp}) ranks, to distill under compression")  # fmt: skip
        self.model, self.vocab_size = model, vocab_size
        self._frequencies = frequencies(model, model.embedding.word_embeddings.weight.device)
        self._tp = tensor_ranks()

    def get_decoder(self) -> Any:
        """(input_ids [B, t], position_ids [B, t], d2o_pass) -> `last_hidden_state` [B, t, H]."""

        def decoder(input_ids: Tensor, position_ids: Tensor, d2o_pass: Forward, use_cache: bool) -> SimpleNamespace:
            assert not use_cache
            hidden = hidden_states(self.model, d2o_pass, input_ids, position_ids, self._frequencies)
            return SimpleNamespace(last_hidden_state=hidden.transpose(0, 1))

        return decoder

    def get_output_embeddings(self) -> Any:
        """Hidden states [..., H] -> logits [..., V], on every tensor rank."""
        model = self.model
        tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None

        def head(hidden: Tensor) -> Tensor:
            logits, _ = model.output_layer(hidden[:, None], weight=tied, runtime_gather_output=False)
            return _Gathered.apply(logits[:, 0], self._tp)[..., : self.vocab_size]

        return head


class _Gathered(torch.autograd.Function):
    """The columns of all tensor ranks. They all compute the same loss of them, so each keeps its own gradients."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, comm: Collectives) -> Tensor:
        ctx.comm = comm
        return comm.all_gather(part.contiguous(), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.comm.size, -1)[ctx.comm.rank].contiguous(), None
