"""A Hugging Face model behind the seam."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.models.base import ModelAdapter
from d2o_dist.models.hf.cache import D2OCache
from d2o_dist.models.hf.forward import run_model
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.models.hf.tiles import in_tiles, tile_refusal
from d2o_dist.policy.config import D2OConfig


class HFModel(ModelAdapter):
    """A model loaded with `attn_implementation="d2o"`, in evaluation mode, or what wraps one (LoRA)."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shape = shape_of(model.config)

    @property
    def device(self) -> torch.device:
        """See `ModelAdapter`."""
        return self.model.device

    @cached_property
    def tile_refusal(self) -> str | None:
        """See `ModelAdapter`."""
        return tile_refusal(self.model)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Those of the generation configuration, one or a list."""
        found = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return frozenset(i for i in (found if isinstance(found, (list, tuple)) else [found]) if i is not None)

    def make_cache(
        self,
        d2o: D2OConfig,
        mesh: ParallelMesh | None = None,
        parallel: ParallelConfig | None = None,
        counter: TrafficCounter | None = None,
    ) -> D2OCache:
        """See `ModelAdapter`."""
        return D2OCache(self.model.config, d2o, mesh, parallel, counter)

    def forward(
        self, ids: Tensor, positions: Tensor | None, cache: Any, mask: Tensor | None = None, *,
        all_logits: bool = False, tiles: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """See `ModelAdapter`."""
        with nullcontext() if tiles is None else in_tiles(self.model, tiles):
            return run_model(self.model, ids, positions, cache, mask, all_logits=all_logits)
