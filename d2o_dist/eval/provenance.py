"""What figures depend on besides the configuration: versions, revision, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("d2o_dist", "torch", "transformers", "tokenizers", "datasets", "deepspeed", "lm_eval")


def environment(world_size: int) -> dict[str, Any]:
    """Plain values, for JSON and for the head of a report."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name)) is not None},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "ranks": world_size,
        "load average": round(os.getloadavg()[0], 2),
    }


def package_version(name: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_revision(file: Path = Path(__file__)) -> str | None:
    """Commit of the checkout this package runs from, with `+changes` where it differs from it; None without one."""
    run = ["git", "-C", str(file.parent)]
    try:
        # An installed package may lie inside the checkout of something else, which does not know it.
        subprocess.run([*run, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*run, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes.strip() else "")
