"""Copies of a cache: in memory, in a file, on another device."""

from __future__ import annotations

import copy
import weakref
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers.cache_utils import DummyLayer

from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.cache.stored import put_together, take_apart
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.models.cache import ModelCache
from d2o_dist.models.hf import saved
from d2o_dist.models.hf.identity import describe_model
from d2o_dist.models.layer import LayerView
from d2o_dist.policy.config import D2OConfig


class CopiedCache(ModelCache):
    """What `D2OCache` can be copied by: `copy`, `pickle`, `torch.save`, `save` and `load`, `to`.

    A copy goes on to the bit as the cache itself does.
    """

    model_config: Any
    _modules: dict[int, weakref.ref[nn.Module]]
    _filled_with: dict[str, Any] | None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and `torch.save`: everything but the model's modules. Only of a cache that ranks do not share."""
        # In parts: pickle would give each of the tensors that share memory its own.
        parts = self.d2o, self.compressed.windows, take_apart(self.compressed)
        layers = [None if isinstance(layer, LayerView) else layer for layer in self.layers]
        return {**vars(self), "_modules": {}, "layers": layers, "compressed": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        d2o, windows, parts = state["compressed"]
        vars(self).update(state, compressed=CompressedCache(d2o, windows, state["ranks"]))
        put_together(self.compressed, parts)
        numbers = count()
        self.layers = [self.view_class(self.compressed, next(numbers)) if layer is None else layer
                       for layer in state["layers"]]  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A cache of the same contents for the same model."""
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy({**vars(self), "_modules": {}}, memo), _modules=dict(self._modules))
        return made

    def __copy__(self) -> Self:
        """As `copy.deepcopy`: two caches that share their slots would write over each other's."""
        return copy.deepcopy(self)

    def _check_views(self, what: str) -> None:
        known = (self.view_class, DummyLayer)  # the latter of layers that share what others hold
        if (unknown := next((layer for layer in self.layers if type(layer) not in known), None)) is not None:
            raise ValueError(f"a cache with a {type(unknown).__name__}, which keeps a state, cannot be {what}")

    def save(self, folder: str | Path) -> None:
        """Write everything that the cache holds to a folder, from which `load` goes on; in any phase, but not in the
        middle of a forward. Where ranks share the request all of them call it, and each writes a file.

        Raises:
            ValueError: no token was seen, the model that filled it is gone, or the folder cannot be written.
        """
        self._check_views("saved")
        modules = [known() for _, known in sorted(self._modules.items())]
        if len(modules) < len(self.layers) or None in modules:
            raise ValueError(
                "a cache can be saved once a model has read a prompt into it, and while that model is there: it is "
                "asked who it is"
            )
        facts = {
            "model": describe_model(self.model_config, modules),
            "longest": self._longest,
            "batch size": self._filled_with["batch size"],
            "dtype": str(self._filled_with["dtype"]).removeprefix("torch."),
        }
        saved.save(folder, self, facts)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: nn.Module,
        mesh: ParallelMesh | None = None,
        parallel: ParallelConfig | None = None,
        counter: TrafficCounter | None = None,
    ) -> Self:
        """A cache that `save` wrote, on the device of the model.

        Args:
            model: the one that filled it, with the same weights in the same dtype.
            mesh: as many ranks as saved it, of the same `tp` and `sp`; parallel: by default as they shared it. All of
                them call it. counter: as of a new cache.

        Raises:
            ValueError: no cache, a damaged one, or one of another model, other ranks or another version of this
                library; on all ranks alike.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"model ({type(model).__name__}) must be the model itself: its weights are compared")

        def make(d2o: D2OConfig, parallel: ParallelConfig) -> Self:
            return cls(model.config, d2o, mesh, parallel, counter)

        made, facts, modules = saved.load(folder, model, mesh or ParallelMesh.local(), parallel, make)
        made._longest = facts["longest"]
        made._filled_with = {
            "batch size": facts["batch size"],
            "dtype": getattr(torch, facts["dtype"]),
            "device": made.layers[0].device,
        }
        made._modules = {layer: weakref.ref(module) for layer, module in enumerate(modules)}
        return made

    def to(self, device: torch.device | str) -> Self:
        """Move everything that the cache holds to a device; the cache itself. The model must be moved too.

        Raises:
            ValueError: in the middle of a forward.
        """
        self._check_views("moved")
        stored = take_apart(self.compressed)
        both = zip(stored.memory, stored.on_host, strict=True)
        stored.memory = [one if on_host else one.to(device) for one, on_host in both]
        put_together(self.compressed, stored)
        if self._filled_with is not None:
            self._filled_with["device"] = self.layers[0].device
        return self
