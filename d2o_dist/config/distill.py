"""`DistillConfig`: what the objective `d2o_distill` adds up, and who its teacher is."""

from __future__ import annotations

from dataclasses import dataclass

from d2o_dist.fields.checks import check_number
from d2o_dist.fields.io import check_choice

TEACHERS = ("current", "base")


@dataclass(frozen=True)
class DistillConfig:
    """Weights of the losses of a step, each a mean over its tokens, and the teacher.

    Attributes:
        kl_weight: of KL(full cache || compressed cache) over the continuation.
        lm_weight: of the language modelling loss of the continuation over the compressed cache.
        context_lm_weight: of the language modelling loss of the context, which is read with full attention: it keeps
            the model from lowering the KL at the expense of the full cache, and costs no further forward.
        temperature: divides the logits of teacher and student.
        teacher: `current`: the model as it is in this step (its context is read once for both); `base`: the model
            without its LoRA weights, which does not move.
    """

    kl_weight: float = 1.0
    lm_weight: float = 0.0
    context_lm_weight: float = 0.0
    temperature: float = 1.0
    teacher: str = "current"

    def __post_init__(self) -> None:
        for name in ("kl_weight", "lm_weight", "context_lm_weight", "temperature"):
            check_number(name, getattr(self, name))
        for name in ("kl_weight", "lm_weight", "context_lm_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        if not self.kl_weight + self.lm_weight > 0:
            raise ValueError(
                f"kl_weight ({self.kl_weight}) and lm_weight ({self.lm_weight}) must not both be 0: nothing would "
                "train the compressed cache"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0")
        check_choice("teacher", self.teacher, TEACHERS)

