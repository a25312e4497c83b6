"""The list of a folder's files, written after all of them: where it is, everything was there, and can be checked."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

MANIFEST = "manifest.json"
# Reading a large file again would take as long as writing it: larger ones are known by their size alone.
CHECKSUM_BYTES = 16 << 20


def files_in(folder: Path) -> list[str]:
    """The names of all files, relative to the folder, but the manifest's own."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def seal(folder: Path) -> None:
    """Bring every file to the disk, then write what there is: names, sizes, and checksums of the small ones."""
    files = {}
    for name in files_in(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
            files[name] = {"bytes": size, "crc32": zlib.crc32(file.read()) if size <= CHECKSUM_BYTES else None}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder, beginning with its path; None: all files are as they were."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{manifest} is not there"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        listed = [(folder / name, entry["bytes"], entry["crc32"]) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} is damaged"
    for path, size, checksum in listed:
        if not path.is_file():
            return f"{path} is not there"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes and not {size}"
        if checksum is not None and zlib.crc32(path.read_bytes()) != checksum:
            return f"{path} is not what was written"
    return None
