"""Kinds of GPUs: a table in the package, to which a file may add."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d2o_dist.fields.declare import real
from d2o_dist.fields.io import build, did_you_mean, load_yaml
from d2o_dist.policy.rule import check_fields

_TABLE = Path(__file__).with_name("gpus.yaml")


@dataclass(frozen=True)
class Gpu:
    """One GPU. Figures as in `gpus.yaml`, which says what each is."""

    memory_gib: float = real(0.0, above=0)
    bandwidth_gb_s: float = real(0.0, above=0)
    tflops: float = real(0.0, above=0)
    intra_gb_s: float = real(0.0, above=0)
    inter_gb_s: float = real(0.0, above=0)

    def __post_init__(self) -> None:
        check_fields(self, "gpu")


def find_gpu(name: str, file: str | Path | None = None) -> Gpu:
    """The GPU of this name, of the file where both know it.

    Raises:
        ValueError: nobody knows it, or a figure is missing or out of its limits.
    """
    table = {**load_yaml(_TABLE), **({} if file is None else load_yaml(file))}
    if name not in table:
        raise ValueError(
            f"gpu ({name}) is not known.{did_you_mean(name, table)} Known: {', '.join(table)}; others come from a "
            "--gpu-file"
        )
    return build(Gpu, table[name])
