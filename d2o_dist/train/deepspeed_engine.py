"""The training engine on DeepSpeed ZeRO 0 to 3.

All ranks are data parallel to DeepSpeed, also those that share a row's tokens: a rank's loss is its part of a sum over
ranks, and the sum of gradients is right whoever the parts belong to. DeepSpeed averages, so losses are scaled by the
number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from d2o_dist.comm import Collectives
from d2o_dist.config.train import TrainConfig
from d2o_dist.train.engine import are_finite, make_adamw
from d2o_dist.train.manifest import fault, seal
from d2o_dist.train.objective import Losses, Objective

TAG = "deepspeed"
FACTS_FILE = "deepspeed_engine.json"
UNIVERSAL = "universal"


def deepspeed_config(config: TrainConfig, micro_steps: int, world: int, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run; entries of `engine.deepspeed` take precedence."""
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    for name, where in (("offload_optimizer", engine.offload_optimizer), ("offload_param", engine.offload_parameters)):
        if where != "none":
            zero[name] = {"device": where, "pin_memory": torch.cuda.is_available()}
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": config.micro_batch_size * micro_steps * world,
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
        "zero_optimization": zero,
        # The optimizer is PyTorch's own, also where DeepSpeed would rather compile one.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 10**9,
    }
    return _merged(values, engine.deepspeed)


def _merged(values: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


class DeepSpeedEngine:
    """See `engine.Engine`. Every rank makes it at the same point, after the process group.

    Args:
        world: over all ranks.
        resume_from: the checkpoint that `load` will be given, or None: DeepSpeed wants to know beforehand.
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        micro_steps: int,
        world: Collectives,
        resume_from: Path | None = None,
    ) -> None:
        import deepspeed

        if not torch.cuda.is_available():
            # An operator that DeepSpeed would compile for a minute, and that ignores process groups.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.objective = objective
        self.world = world
        self.stage = config.engine.zero_stage
        self._universal = resume_from is not None and self._needs_universal(resume_from)
        self._engine, _, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=make_adamw(objective, config.optimizer),
            config=deepspeed_config(config, micro_steps, world.size, self._universal),
            dist_init_required=False,
        )

    # ---- steps ---------------------------------------------------------------------------------------------------

    def micro_step(self, kind: str, **arguments: Any) -> Losses:
        """See `Engine`."""
        losses = self._engine(kind, **arguments)
        self._engine.backward(losses.total * self.world.size, scale_wrt_gas=False)
        # Before the last micro step this only counts; at it, the optimizer must wait for the learning rate.
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
        return losses

    def update(self, lr: float) -> float:
        """See `Engine`."""
        norm = self._norm_unsharded()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        # Of gradients that are not finite DeepSpeed takes no step, or says -1.
        odd = norm is None or norm < 0 or getattr(self._engine.optimizer, "overflow", False)
        return math.inf if odd else float(norm)

    def _norm_unsharded(self) -> float | None:
        """The norm of averaged gradients where no ZeRO optimizer measures it: in stage 0 without bfloat16."""
        if self.stage > 0 or self._engine.bfloat16_enabled():
            return None
        grads = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def weights_are_finite(self) -> bool:
        """See `Engine`."""
        trained = (p for p in self.objective.parameters() if p.requires_grad)
        return are_finite(getattr(p, "ds_tensor", p) for p in trained)  # under ZeRO-3, this rank's shard

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `Engine`."""
        self.objective.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.objective.train()

    # ---- state ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """See `Engine`. All ranks write their shards."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self.world.rank == 0:
            facts = {"world_size": self.world.size, "zero_stage": self.stage}
            (folder / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """See `Engine`. Shards of another number of ranks are first converted to DeepSpeed's universal format."""
        tag = UNIVERSAL if self._universal else TAG
        if self._universal:
            self.world.barrier()
            if self.world.rank == 0:
                _convert(folder)
            self.world.barrier()
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if loaded is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint {tag}")

    def _needs_universal(self, folder: Path) -> bool:
        """Whether the shards are those of another layout.

        Raises:
            ValueError: the checkpoint is another engine's, or its layout cannot be changed.
        """
        if not (folder / FACTS_FILE).is_file():
            raise ValueError(f"{folder} holds no {FACTS_FILE}: it was written by another engine")
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        if facts["zero_stage"] != self.stage:
            raise ValueError(f"engine.zero_stage ({self.stage}) must be that of {folder} ({facts['zero_stage']})")
        # Stage 0 holds everything on every rank.
        return self.stage > 0 and facts["world_size"] != self.world.size

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """See `Engine`."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        # Gathered on all ranks; read on the first.
        with deepspeed.zero.GatheredParameters(list(self.objective.parameters()), modifier_rank=None):
            yield


def _convert(folder: Path) -> None:
    """Write `folder/universal` from `folder/deepspeed`, unless it is there and complete."""
    from deepspeed.checkpoint import ds_to_universal

    target = folder / UNIVERSAL
    if fault(target) is None:
        return
    scratch = folder / f".{UNIVERSAL}"
    for left in (target, scratch):
        shutil.rmtree(left, ignore_errors=True)
    options = argparse.Namespace(
        input_folder=str(folder / TAG), output_folder=str(scratch), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every stage of its work
        ds_to_universal.main(options)
    seal(scratch)
    scratch.rename(target)
