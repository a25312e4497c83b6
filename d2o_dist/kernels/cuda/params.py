"""The structs of the C interface, field by field as in evict_params.cuh and step.cuh."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p

from torch import Tensor

from d2o_dist.config.d2o import D2OConfig

# The fields of a configuration that an eviction while decoding reads. Of those with a choice, the values that the
# kernel knows, in the order of its own numbers for them: what has another value is not for it.
CHOICES: dict[str, tuple[str, ...]] = {
    "selection": ("cumulative", "window", "mixed", "recent", "reread"),
    "merge": ("keys_values", "values", "mass", "released", "none"),
    "merge_targets": ("kept", "tail"),
    "gate": ("threshold", "quantile"),
    "threshold_agg": ("mean", "max"),
}
# Numbers that it takes as they are.
NUMBERS = (
    "num_sink_tokens", "tail_fraction", "max_decode_tail", "drop_quantile", "ema_beta", "self_weight", "max_log_mass",
)  # fmt: skip


def unserved_rule(config: D2OConfig) -> str | None:
    """The first rule of the configuration that no kernel here knows, in words; None: an eviction can be left to it."""
    for name, known in CHOICES.items():
        if (value := getattr(config, name)) not in known:
            return f"{name} ({value})"
    return None


class Strided(ctypes.Structure):
    """A tensor of up to four dims whose last one is contiguous: its data, and strides in elements."""

    _fields_ = [("data", c_void_p), ("row", c_int64), ("head", c_int64), ("slot", c_int64)]

    @classmethod
    def of(cls, tensor: Tensor | None) -> Strided:
        """[B, H], [B, H, S] or [B, H, S, D]; None: null."""
        if tensor is None:
            return cls(None, 0, 0, 0)
        strides = [*tensor.stride()[:3], 0][:3]
        return cls(tensor.data_ptr(), *strides)


_SLOTS = [(name, Strided) for name in ("keys", "values", "positions", "scores", "rates", "log_mass")]


class EvictParams(ctypes.Structure):
    """evict_params.cuh: EvictParams."""

    _fields_ = [
        *_SLOTS,
        *((name, c_void_p) for name in ("rows", "threshold_before", "threshold")),
        *((name, c_void_p) for name in ("merged_before", "dropped_before", "merged", "dropped", "gated")),
        # Set by the library itself.
        *((name, c_void_p) for name in ("victims", "victim_keys", "victim_values", "victim_rates", "nearest")),
        *((name, c_void_p) for name in ("halo_keys", "halo_values", "halo_positions", "halo_statistics")),
        *((name, c_double) for name in ("tail_fraction", "drop_quantile")),
        *((name, c_float) for name in ("ema_beta", "ema_rest", "max_log_mass", "self_weight")),
        *((name, c_int32) for name in ("batch", "heads", "head_dim", "item_size", "dtype")),
        *((name, c_int32) for name in ("most_held", "most_victims", "num_parts")),
        *((name, c_int32) for name in ("selection", "merge", "tail_targets", "max_tail")),
        *((name, c_int32) for name in ("by_quantile", "threshold_by_max")),
        *((name, c_int32) for name in ("num_sinks", "halves", "schedule")),
    ]


class AppendParams(ctypes.Structure):
    """step.cuh: AppendParams."""

    _fields_ = [
        *_SLOTS,
        ("new_keys", Strided),
        ("new_values", Strided),
        ("index", c_void_p),
        ("seen", c_void_p),
        *((name, c_int32) for name in ("batch", "heads", "head_dim", "capacity", "dtype", "schedule")),
    ]


class ScoreParams(ctypes.Structure):
    """step.cuh: ScoreParams."""

    _fields_ = [
        *((name, Strided) for name in ("logits", "lse", "scores", "rates", "probs")),
        ("newest", c_void_p),
        ("present", c_void_p),
        *((name, c_int32) for name in ("batch", "heads", "group", "num_slots", "schedule")),
        ("decay", c_float),
        ("rest", c_float),
    ]
