"""Stands in for the package index."""

from __future__ import annotations

import zipfile
from pathlib import Path


def fake_wheel(members: dict[str, str], calls: list[str] | None = None):
    """Stands in for download_wheel: a wheel with these members, whatever is asked for."""

    def download(requirement: str, folder: Path) -> Path:
        if calls is not None:
            calls.append(requirement)
        with zipfile.ZipFile(folder / "fake-1-py3-none-any.whl", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return folder / "fake-1-py3-none-any.whl"

    return download
