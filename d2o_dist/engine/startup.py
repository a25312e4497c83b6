"""What all ranks of a job must have in common before they begin: code, settings, and the model under its name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.models import loading
from d2o_dist.models.digest import model_digests, tokenizer_digests


def check_same_run(mesh: ParallelMesh, settings: Mapping[str, Any], model: InferConfig) -> None:
    """Refuse ranks that would not run the same thing. Every rank of the mesh calls it, before weights are loaded.

    Before a mesh is cut, too: ranks whose settings differ would not make the same process groups. `build_mesh(dp=N)`
    of all N ranks makes none.

    Args:
        settings: all that the run was told, nested or not.
        model: names model and tokenizer.

    Raises:
        AgreedError: versions, settings or files of the model differ, or a rank has no such model; on all ranks, naming
            what and where.
    """
    if mesh.world_size == 1:
        return
    with agreed(mesh) as same:
        for name, version in (("torch", torch.__version__), *loading.versions()):
            same.add(name, version, shown=version)
        same.add("the code of d2o_dist", _code_digest())
        for name, value in flat(settings):
            same.add(f"the setting {name}", value, shown=value)
        loading.describe(model)  # says what is wrong where there is none
        own = model.tokenizer or model.model
        for source, files in ((model.model, model_digests(model.model, model.revision)), (own, tokenizer_digests(own))):
            for name, digest in files.items():
                same.add(f"{name} of {source}", digest)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _code_digest() -> str:
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
