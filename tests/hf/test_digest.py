"""Digests of a model's files: what must change them, what must not, and how much is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2o_dist.models import digest as digesting
from d2o_dist.models.digest import file_digest, model_digests, one_digest
from tests.engine.tiny import make_folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "m")


def test_the_files_a_model_is_made_of(folder):
    before = model_digests(str(folder))
    assert list(before) == ["config.json", "generation_config.json", "model.safetensors"]
    (folder / "README.md").write_text("notes")
    (folder / "optimizer.bin").write_bytes(b"x")
    assert model_digests(str(folder)) == before
    (folder / "modeling_own.py").write_text("x = 1\n")
    assert list(model_digests(str(folder)))[3:] == ["modeling_own.py"]
    assert one_digest(model_digests(str(folder))) != one_digest(before)


def test_shards_are_those_of_the_index(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(weights)}
    for part in ("part-0.safetensors", "part-1.safetensors", "left-over.safetensors"):
        save_file({name: weights[name] for name in weights if names[name] == part} or weights, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert list(model_digests(str(folder)))[2:] == [index.name, "part-0.safetensors", "part-1.safetensors"]
    (folder / "part-1.safetensors").unlink()  # whoever loads says so
    assert list(model_digests(str(folder)))[2:] == [index.name, "part-0.safetensors"]


@pytest.mark.parametrize("size", ["whole", "sampled"])
def test_every_tensor_counts(tmp_path, monkeypatch, size):
    monkeypatch.setattr(digesting, "_WHOLE_BYTES", 2**30 if size == "whole" else 1000)
    weights = {f"t{number}": torch.full((300, 40), float(number)) for number in range(5)}
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    seen = {file_digest(path)}
    for name in weights:
        save_file({**weights, name: weights[name] + 1}, path)
        seen.add(file_digest(path))
    save_file({("other" if name == "t0" else name): tensor for name, tensor in weights.items()}, path)
    seen.add(file_digest(path))
    assert len(seen) == 7
    save_file(weights, path)
    assert file_digest(path) in seen


def test_of_a_large_file_little_is_read(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_file({f"t{number}": torch.zeros(2**20) for number in range(3)}, path)
    monkeypatch.setattr(digesting, "_WHOLE_BYTES", 1000)
    with path.open("rb") as file:
        blocks = list(digesting._blocks(file, path.stat().st_size))
    assert len(blocks) == 1 + 3 * 3 and sum(stop - start for start, stop in blocks) < 12000


OTHER = [b"no header at all" * 200_000, b"\xff" * 3_000_000, b"\x02" + bytes(7) + b"[]" * 10**6]


@pytest.mark.parametrize("content", OTHER)
def test_other_files_are_sampled_too(tmp_path, monkeypatch, content):
    monkeypatch.setattr(digesting, "_WHOLE_BYTES", 1000)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    before = file_digest(path)
    path.write_bytes(content[:-1] + b"?")
    assert file_digest(path) != before
    path.write_bytes(content + b"?")
    assert file_digest(path) != before


def test_a_hub_name_is_known_by_its_commit(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--some--model"
    for commit in ("c0ffee", "badcab"):
        (root / "snapshots" / commit).mkdir(parents=True)
        (root / "snapshots" / commit / "config.json").write_bytes((folder / "config.json").read_bytes())
    (root / "refs").mkdir()
    found = []
    for commit in ("c0ffee", "badcab"):
        (root / "refs" / "main").write_text(commit)
        found.append(model_digests("some/model"))
    assert [each["commit"] for each in found] == ["c0ffee", "badcab"]
    assert found[0]["config.json"] == found[1]["config.json"] == model_digests(str(folder))["config.json"]
