"""What the training loop asks of an engine, and the reference: PyTorch alone, every rank with all weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from d2o_dist.comm import Collectives
from d2o_dist.config.train_parts import OptimizerConfig
from d2o_dist.train.objective import Losses, Objective

STATE_FILE = "torch_engine.pt"
# Gradients are added up over ranks in pieces of this many elements.
_BUCKET = 1 << 25


class Engine(Protocol):
    """Forward, backward, update; and what a checkpoint holds."""

    objective: Objective

    def micro_step(self, kind: str, **arguments: Any) -> Losses:
        """One forward and backward; gradients add up until `update`. The sum over ranks and micro steps is trained."""

    def update(self, lr: float) -> float:
        """Clip, take an optimizer step, forget the gradients. Their norm before clipping."""

    def weights_are_finite(self) -> bool:
        """Of the trained weights that this rank holds."""

    def evaluating(self) -> Any:
        """A context in which the objective may be called for measuring."""

    def save(self, folder: Path) -> None:
        """Write all state into `folder`, which exists; called by all ranks."""

    def load(self, folder: Path) -> None:
        """Read what `save` of the same kind of engine wrote, on any number of ranks; called by all of them."""

    def gathered_weights(self) -> Any:
        """A context in which the first rank sees all weights of the model."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters for AdamW: matrices with weight decay, vectors without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter's own shape is empty, and `ds_shape` is what it was.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    known = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in known], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters of a module."""
    groups = parameter_groups(module, config.weight_decay)
    fused = all(p.device.type == "cuda" for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements are."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


class TorchEngine:
    """Every rank holds weights, gradients and optimizer states; gradients are added up over all ranks.

    Args:
        objective: with float32 (or float64) weights.
        world: over all ranks.
        autocast: bfloat16, or None to compute in the weights' dtype.
    """

    def __init__(
        self, objective: Objective, config: OptimizerConfig, world: Collectives, autocast: torch.dtype | None
    ) -> None:
        self.objective = objective
        self.max_norm = config.max_grad_norm
        self.world = world
        self.autocast = autocast
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.optimizer = make_adamw(objective, config)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        device = self.parameters[0].device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            yield

    def micro_step(self, kind: str, **arguments: Any) -> Losses:
        """See `Engine`."""
        with self._computing():
            losses = self.objective(kind, **arguments)
        losses.total.backward()
        return losses

    def update(self, lr: float) -> float:
        """See `Engine`."""
        self._add_up()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm or torch.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def weights_are_finite(self) -> bool:
        """See `Engine`."""
        return are_finite(self.parameters)

    @torch.no_grad()
    def _add_up(self) -> None:
        """Sum the gradients over ranks. A parameter that got none here counts as zero: ranks must send the same."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.world.size == 1:
            return
        for bucket in _buckets([p.grad for p in self.parameters]):
            total = self.world.all_reduce(torch.cat([grad.flatten() for grad in bucket]))
            for grad, part in zip(bucket, total.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `Engine`."""
        self.objective.eval()
        try:
            with torch.no_grad(), self._computing():
                yield
        finally:
            self.objective.train()

    def save(self, folder: Path) -> None:
        """See `Engine`. Ranks hold the same: the first one writes."""
        if self.world.rank == 0:
            weights = {name: p.detach() for name, p in self.objective.named_parameters() if p.requires_grad}
            torch.save({"weights": weights, "optimizer": self.optimizer.state_dict()}, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """See `Engine`.

        Raises:
            ValueError: the checkpoint was written by another engine, or for other weights.
        """
        if not (folder / STATE_FILE).is_file():
            raise ValueError(f"{folder} holds no {STATE_FILE}: it was written by another engine")
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        own = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        if own.keys() != state["weights"].keys():
            odd = sorted(own.keys() ^ state["weights"].keys())
            raise ValueError(f"{folder} holds other trained weights than this run has; the first is {odd[0]}")
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """See `Engine`. Nothing is scattered."""
        yield


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together at most `_BUCKET` elements unless one alone has more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
