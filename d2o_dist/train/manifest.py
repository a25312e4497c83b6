"""The list of a folder's files, written after all of them: where it is, everything was there, and can be checked."""

from __future__ import annotations

import errno
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def files_in(folder: Path) -> list[str]:
    """The names of all files, relative to the folder, but the manifest's own."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def seal(folder: Path) -> None:
    """Write what there is: names, sizes and checksums, read back from the files. Then bring all of it to the disk."""
    names = files_in(folder)
    with ThreadPoolExecutor() as pool:
        checksums = pool.map(_checksum, [folder / name for name in names])
        files = {
            name: {"bytes": (folder / name).stat().st_size, "crc32": checksum}
            for name, checksum in zip(names, checksums, strict=True)
        }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    sync_tree(folder)


def fault(folder: Path, *, read: bool = True) -> str | None:
    """What is wrong with a sealed folder, beginning with its path; None: all files are as they were.

    Args:
        read: every file is read, which may take as long as writing them did; otherwise sizes are compared.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{manifest} is not there"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        listed = [(folder / name, entry["bytes"], entry["crc32"]) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} is damaged"
    for path, size, _ in listed:
        if not path.is_file():
            return f"{path} is not there"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes and not {size}"
    # Earlier versions have no checksums of large files.
    known = [(path, checksum) for path, _, checksum in listed if read and checksum is not None]
    with ThreadPoolExecutor() as pool:
        found = pool.map(_checksum, [path for path, _ in known])
        changed = [path for (path, checksum), now in zip(known, found, strict=True) if now != checksum]
    return f"{changed[0]} is not what was written" if changed else None


def sync_tree(folder: Path) -> None:
    """Bring to the disk all files under a folder, and the folders themselves."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk: a crash of the machine then keeps them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has nothing to do for a folder
            raise
    finally:
        os.close(handle)


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found
