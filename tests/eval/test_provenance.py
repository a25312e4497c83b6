"""What a run says about where it comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from d2o_dist.eval import provenance


def git(folder: Path, *arguments: str) -> str:
    run = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()


def test_the_revision_is_that_of_the_package(tmp_path):
    """An environment often lies inside the checkout of the project that uses it."""
    own, installed = tmp_path / "package.py", tmp_path / ".venv" / "lib" / "package.py"
    installed.parent.mkdir(parents=True)
    for file in (own, installed):
        file.write_text("1\n")
    assert provenance.git_revision(own) is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package.py")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.git_revision(own) == commit
    assert provenance.git_revision(installed) is None
    own.write_text("2\n")
    assert provenance.git_revision(own) == commit + "+changes"
