"""What serves what on this machine: for each op the implementation that is taken, and why those before it are not."""

import importlib
import pkgutil
from collections.abc import Sequence

import torch

from d2o_dist import kernels
from d2o_dist.kernels.registry import OPS, Call


def serving(device: str, dtypes: Sequence[torch.dtype], head_dim: int = 128) -> list[dict[str, str]]:
    """Rows of op, trait of the call, dtypes and outcome, with the backend that is set; no tensor is made.

    A package that could serve is imported, to see whether it can be used.
    """
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.ispkg:
            importlib.import_module(f"{kernels.__name__}.{module.name}")
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, op in OPS.items():
        traits = sorted({trait for one in op.implementations for trait in one.needs | one.without})
        for trait in ("", *traits):
            for dtype in dtypes:
                call = Call(torch.device(device), dtype, head_dim, traits=frozenset({trait} - {""}))
                passed = []
                for one, declined, lacking in op.considered(call):
                    if not declined and not lacking:
                        rows.setdefault((name, trait, str(one), "; ".join(passed)), []).append(str(dtype)[6:])
                        break
                    passed.append(f"{one}: {declined or lacking}")
    return [
        {"op": op, "with": trait, "dtypes": ", ".join(dtypes), "taken": taken, "passed over": passed}
        for (op, trait, taken, passed), dtypes in rows.items()
    ]
