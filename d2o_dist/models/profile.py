"""Profiles of models: shares of layers, measured once, in a small file beside the model or in the user's cache.

A profile says which files it was measured on, and is refused where the model has others now.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from d2o_dist.fields.io import to_json
from d2o_dist.files.whole import replace_text
from d2o_dist.models.digest import model_digests, model_paths, one_digest
from d2o_dist.policy.budget import Profile
from d2o_dist.policy.config import D2OConfig

FILE = "d2o_profile.json"
CACHE_ENV = "D2O_DIST_CACHE"


@dataclass(frozen=True)
class ModelProfile:
    """What a file holds.

    Attributes:
        model: digest of the files of the model that it was measured on.
        shares: of each layer with full attention, of a total of 1.
        measured: how, as plain values: for people.
    """

    model: str
    shares: tuple[float, ...]
    measured: dict[str, Any] = field(default_factory=dict)


def with_profile(d2o: D2OConfig, source: str | None, revision: str | None = None) -> D2OConfig:
    """The configuration, with the shares of the model's profile where its budget rule is `profile` and has none.

    Args:
        source: folder or hub name of the model; revision: of the hub's.

    Raises:
        ValueError: there is no profile, or none of this model; names the command that makes one.
    """
    if not isinstance(d2o.budget, Profile) or d2o.budget.shares is not None:
        return d2o
    if source is None:
        raise ValueError(
            "budget.rule (profile) reads a file of the model's, and it is not known where this model is from: give "
            "budget.shares, a number for each layer with full attention"
        )
    return d2o.replace(budget={"shares": read_profile(source, revision).shares})


def read_profile(source: str, revision: str | None = None) -> ModelProfile:
    """The profile of a model.

    Raises:
        ValueError: there is none, it is damaged, or it was measured on other files.
    """
    identity, command = identity_of(source, revision), f"run `d2o-dist profile {source}`"
    paths = [path for path in places(source, identity) if path.is_file()]
    if not paths:
        raise ValueError(f"budget.rule (profile) needs a profile of {source}, and there is none: {command}")
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            shares = Profile(shares=values["shares"]).shares or ()
            found = ModelProfile(values["model"], shares, values["measured"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"profile {path} cannot be read ({error!r}): {command} again") from error
        if found.model == identity:
            return found
    raise ValueError(f"profile {paths[0]} was measured on other files than {source} has now: {command} again")


def write_profile(source: str, profile: ModelProfile) -> Path:
    """Write the profile of a model to the first place that can be written; where it is now.

    Raises:
        ValueError: none can.
    """
    text, reasons = to_json(dataclasses.asdict(profile), indent=1) + "\n", []
    for path in places(source, profile.model):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, text)
            return path
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
    raise ValueError(f"the profile of {source} cannot be written ({'; '.join(reasons)})")


def places(source: str, identity: str) -> list[Path]:
    """Where the profile of a model is looked for, in this order."""
    folder, root = Path(source).expanduser(), os.environ.get(CACHE_ENV)
    cache = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d2o_dist"
    return ([folder / FILE] if folder.is_dir() else []) + [cache / "profiles" / f"{identity}.json"]


def identity_of(source: str, revision: str | None = None) -> str:
    """A digest of the files that a model is made from: what `model_digests` tells apart."""
    folder = Path(source).expanduser()
    marks = [(path, path.stat()) for path in model_paths(folder)] if folder.is_dir() else []
    return _identity(source, revision, tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in marks))


@lru_cache(maxsize=64)
def _identity(source: str, revision: str | None, marks: tuple[tuple[str, int, int], ...]) -> str:
    """Of files as they are now; asked for whenever a cache is made."""
    return one_digest(model_digests(source, revision))
