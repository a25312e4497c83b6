"""`SamplingConfig`: how tokens are chosen and when a row ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from d2o_dist.fields.checks import check_bool, check_int, check_number, check_strings

# A seed is hashed with the row's index, so any integer that JSON and YAML carry exactly will do.
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen and when a row ends.

    Attributes:
        max_new_tokens: tokens generated for a row at most, the end-of-sequence token included.
        temperature: divides the logits; 0 takes the likeliest token (greedy), and the next two are not used.
        top_p: smallest set of likeliest tokens whose probabilities reach this, in (0, 1]; 1 keeps all.
        top_k: that many likeliest tokens; 0 keeps all.
        repetition_penalty: divides (multiplies, where negative) the logits of tokens seen before, prompt included;
            1 changes nothing.
        seed: with the row's index in the input it seeds the row's own random numbers.
        stop: a row ends when one of these strings is in its text; the text is cut before it. A string that holds
            special tokens, such as `<|im_end|>`, is looked for in the text with them.
        ignore_eos: do not end at an end-of-sequence token.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", check_strings("stop", self.stop))
        check_int("max_new_tokens", self.max_new_tokens, low=1)
        check_int("top_k", self.top_k, low=0)
        check_int("seed", self.seed, low=0, high=MAX_SEED)
        check_bool("ignore_eos", self.ignore_eos)
        for name in ("temperature", "top_p", "repetition_penalty"):
            check_number(name, getattr(self, name))
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must be at least 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be in (0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty ({self.repetition_penalty}) must be above 0")

    @property
    def is_greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature == 0

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return {**vars(self), "stop": list(self.stop)}
