"""A cache that was pickled, copied, moved or saved and loaded goes on to the bit as the one that never was."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.cache.stored import take_apart
from d2o_dist.comm.mesh import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.models.hf.shard import shard_model
from tests.models import left_padded, tiny_model, tokens
from tests.ranks import run_ranks
from tests.spec import spec

RAGGED = [60, 33, 7]
REREAD = D2OConfig.preset("reread", keep_ratio=0.5, budget={"min_layer_tokens": 1}, score={"chunk": 32})
CONFIGS = {
    "default": spec(keep_ratio=0.4, min_layer_tokens=1, eviction_interval=5),
    "sampled": spec(keep_ratio=0.4, min_layer_tokens=1, score_queries="strided", allocation="dynamic"),
    "protected": spec(keep_ratio=0.6, min_layer_tokens=1, protected_layers=(0,)),
    "full": D2OConfig.preset("full"),
    "reread": REREAD,
}


def forward(model, cache: D2OCache, new: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
    with torch.no_grad():
        return model(new, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def longer(mask: Tensor, count: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)


def read(model, d2o: D2OConfig, ids: Tensor, mask: Tensor) -> D2OCache:
    cache = D2OCache(config=model.config, d2o=d2o)
    for start, stop in ((0, 29), (29, ids.shape[1])):
        forward(model, cache, ids[:, start:stop], mask[:, :stop])
    if d2o.needs_reread:
        cache.reread(model, ids, mask)
    return cache


def go_on(model, cache: D2OCache, mask: Tensor) -> list[Tensor]:
    """Logits of greedy steps, of a second turn and of steps after it; then what the cache holds."""
    found = []
    for new in (tokens(len(mask), 1, seed=3), tokens(len(mask), 9, seed=4)):
        for _ in range(7):
            mask = longer(mask, new.shape[1])
            found.append(forward(model, cache, new, mask))
            new = found[-1][:, -1:].argmax(-1)
    return found + [getattr(layer, name) for layer in cache.layers for name in ("keys", "positions", "scores")]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def by_pickle(cache, model, folder):
    return pickle.loads(pickle.dumps(cache))


def by_torch(cache, model, folder):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_file(cache, model, folder):
    cache.save(folder)
    return D2OCache.load(folder, model)


def by_move(cache, model, folder):
    return copy.copy(cache).to("cpu")


WAYS = [by_pickle, by_torch, by_file, by_move]


@pytest.mark.parametrize("when", ["read", "compressed", "decoding"])
@pytest.mark.parametrize("family, name", [
    ("mistral_sliding", "default"), ("llama", "sampled"), ("qwen3", "protected"), ("llama", "full"),
    ("mistral_sliding", "reread"),
])  # fmt: skip
def test_it_goes_on_to_the_bit(family, name, when, tmp_path):
    model = tiny_model(family, num_hidden_layers=2)
    ids, mask = left_padded(RAGGED)
    cache = read(model, CONFIGS[name], ids, mask)
    if when != "read":
        cache.finalize()
    if when == "decoding":
        for _ in range(6):
            mask = longer(mask, 1)
            forward(model, cache, tokens(3, 1), mask)
    others = [way(cache, model, tmp_path / way.__name__) for way in WAYS]
    expected = go_on(model, cache, mask)
    for way, other in zip(WAYS, others, strict=True):
        assert equal(go_on(model, other, mask), expected), way.__name__


def test_rows_are_selected_and_joined_after_it(tmp_path):
    model = tiny_model(num_hidden_layers=2)
    ids, mask = left_padded(RAGGED)
    cache = read(model, CONFIGS["default"], ids, mask)
    cache.finalize()
    loaded = by_file(cache, model, tmp_path)
    rows = torch.tensor([2, 0, 0])
    for one in (cache, loaded):
        one.batch_select_indices(rows)
        one.join(copy.deepcopy(one))
    both = torch.cat([mask[rows]] * 2)
    assert equal(go_on(model, loaded, both), go_on(model, cache, both))
    assert str(loaded.report()) == str(cache.report())


def test_what_was_read_and_not_compressed_serves_many_configurations(tmp_path):
    model = tiny_model(num_hidden_layers=2)
    ids, mask = left_padded([50])
    cache = read(model, CONFIGS["default"], ids, mask)
    other = spec(keep_tokens=20, min_layer_tokens=1)
    loaded = by_file(cache, model, tmp_path).with_config(other)
    assert equal(go_on(model, loaded, mask), go_on(model, cache.with_config(other), mask))


@pytest.fixture
def kept(tmp_path):
    """A model, and a folder with a cache of it."""
    model = tiny_model(num_hidden_layers=2)
    read(model, CONFIGS["default"], *left_padded([40])).save(tmp_path)
    return model, tmp_path


def test_it_is_one_file_without_a_pickle_and_replaces_an_older_one(kept):
    model, folder = kept
    read(model, CONFIGS["full"], *left_padded([30])).save(folder)
    assert [path.name for path in folder.iterdir()] == ["cache.safetensors"]
    assert D2OCache.load(folder, model).get_seq_length() == 30


def test_a_save_that_fails_leaves_what_was_there(kept, monkeypatch):
    model, folder = kept
    cache = read(model, CONFIGS["full"], *left_padded([30]))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=r"cannot be saved as .*cache.safetensors: No space left on device"):
        cache.save(folder)
    assert [path.name for path in folder.iterdir()] == ["cache.safetensors"]
    assert D2OCache.load(folder, model).get_seq_length() == 40


def test_files_that_are_missing_torn_or_something_else(kept):
    model, folder = kept
    path = folder / "cache.safetensors"
    data = path.read_bytes()
    for wrong in (data[: len(data) // 2], data[:-1], data[:30], b"", b"not one"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"cache.safetensors is damaged, or no cache: "):
            D2OCache.load(folder, model)
    path.unlink()
    with pytest.raises(ValueError, match=r"no cache was saved in .* by one process: no cache.safetensors"):
        D2OCache.load(folder, model)
    with pytest.raises(ValueError, match=r"no cache was saved in .*nowhere"):
        D2OCache.load(folder / "nowhere", model)


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    with safe_open(path, "pt") as file:
        said, tensors = json.loads(file.metadata()["d2o_cache"]), {name: file.get_tensor(name) for name in file.keys()}
    change(said)
    save_file(tensors, path, metadata={"d2o_cache": json.dumps(said)})


def first(said: dict, name: str) -> dict:
    return next(entry[2] for entry in said["entries"] if entry[:2] == ["object", name])


def named(said: dict, other: str) -> None:
    next(entry for entry in said["entries"] if entry[0] == "named")[1] = other


@pytest.mark.parametrize("change, message", [
    (lambda said: said.update(format=7), "of format 7, and this version of d2o_dist reads 1"),
    (lambda said: first(said, "HeadBlock").pop("slot_budgets"), "another version of d2o_dist: a HeadBlock has no slot"),
    (lambda said: first(said, "Slots").update(keys={"at": 10**6}), "do not fit together"),
    (lambda said: named(said, "Popen"), "do not fit together"),
    (lambda said: said["entries"].__setitem__(3, ["object", "Popen", {}]), "do not fit together"),
    (lambda said: said.pop("entries"), "damaged, or no cache: KeyError: 'entries'"),
    (lambda said: said["on_host"].append(True), "damaged, or no cache: "),
    (lambda said: said["d2o"].update(keep_ratio=-1), "keep_ratio"),
])  # fmt: skip
def test_a_file_that_says_something_else(kept, change, message):
    """Nothing that it names is called but what a cache is made of."""
    model, folder = kept
    rewrite(folder / "cache.safetensors", change)
    with pytest.raises(ValueError, match=message):
        D2OCache.load(folder, model)


def test_it_is_only_for_the_model_that_filled_it(kept):
    model, folder = kept
    for other, message in [
        (tiny_model(num_hidden_layers=2, seed=1), r"the weights of layer 0 \(LlamaAttention\) differ \(digests of "),
        (tiny_model(num_hidden_layers=2, rope_theta=5e3), "its rope_parameters is .*10000.0.*, of this model .*5000.0"),
        (tiny_model("qwen2", num_hidden_layers=2), "its .* is .*, of this model"),
        (tiny_model(), "its num_hidden_layers is 2, of this model 4"),
        (tiny_model(num_hidden_layers=2).float(), "from a model in float64, and this one is in float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            D2OCache.load(folder, other)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight += 1e-9
    with pytest.raises(ValueError, match="the weights of layer 1"):
        D2OCache.load(folder, model)
    with pytest.raises(ValueError, match=r"model \(LlamaConfig\) must be the model itself"):
        D2OCache.load(folder, model.config)
    again = tiny_model(num_hidden_layers=2)
    again.config.use_cache = False  # of no matter
    loaded = D2OCache.load(folder, again)
    with pytest.raises(ValueError, match="another model"), torch.no_grad():
        model(tokens(1, 3), past_key_values=loaded)
    with pytest.raises(ValueError, match="batch size 1 and is now used with 2"), torch.no_grad():
        again(tokens(2, 3), past_key_values=loaded)


def test_what_cannot_be_saved_or_moved(tmp_path):
    model = tiny_model(num_hidden_layers=2)
    cache = D2OCache(config=model.config)
    with pytest.raises(ValueError, match="once a model has read a prompt into it"):
        cache.save(tmp_path)
    assert pickle.loads(pickle.dumps(cache)).to("cpu").get_seq_length() == 0
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    cache.begin_step()
    for action in (lambda: cache.save(tmp_path), lambda: cache.to("cpu"), lambda: pickle.dumps(cache)):
        with pytest.raises(ValueError, match="in the middle of a forward or a decode step"):
            action()
    cache.abandon_step()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be saved as"):
        cache.save(tmp_path / "file" / "folder")
    del model
    gc.collect()
    with pytest.raises(ValueError, match="while that model is there"):
        cache.save(tmp_path)


def test_what_counts_tokens_stays_on_the_host():
    """Of a prompt that is read as of one that is compressed; a device without memory tells."""
    model = tiny_model("mistral_sliding", num_hidden_layers=2)
    cache = read(model, REREAD, *left_padded(RAGGED))
    stored = take_apart(cache.to("meta").compressed)
    lie = {(one.device.type, on_host) for one, on_host in zip(stored.memory, stored.on_host, strict=True)}
    assert lie == {("cpu", True), ("meta", False)}
    assert cache.layers[0].keys.device.type == "meta"
    reading = cache.compressed.layers[0].blocks[0]._reading
    assert reading.tokens[0].device.type == "cpu" and reading.last.tokens[0].device.type == "cpu"


# ---- ranks -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def on_ranks(rank: int, world: int, options: dict, d2o: D2OConfig, folder: str) -> bool:
    parallel = ParallelConfig(tp_engine="transformers", **options)
    mesh = build_mesh(1, parallel.sp, parallel.tp)
    model = shard_model(tiny_model(num_hidden_layers=2), mesh, parallel, torch.device("cpu"))
    sessions = [Session(model, d2o, mesh, parallel) for _ in range(2)]
    logits = sessions[0].prefill(*left_padded([50, 23]))
    for _ in range(3):
        logits = sessions[0].decode(logits.argmax(-1))
    with pytest.raises(ValueError, match="that ranks share .* cannot be pickled"):
        pickle.dumps(sessions[0].cache)
    sessions[0].cache.save(folder)
    sessions[1].cache = D2OCache.load(folder, model, mesh)
    found = []
    for session in sessions:
        there = [logits]
        for _ in range(8):
            there.append(session.decode(there[-1].argmax(-1)))
        there.append(session.prefill(*left_padded([9, 4], seed=1)))
        for _ in range(8):
            there.append(session.decode(there[-1].argmax(-1)))
        found.append(there + [layer.positions for layer in session.cache.layers])
    return equal(*found)


@pytest.mark.multirank
@pytest.mark.parametrize("options, name", [
    ({"tp": 2}, "default"), ({"tp": 2}, "reread"), ({"sp": 2}, "default"), ({"sp": 2, "sp_prefill": "ring"}, "default"),
])  # fmt: skip
def test_ranks_save_a_file_each(options, name, tmp_path):
    assert all(run_ranks(2, on_ranks, options, CONFIGS[name], str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"cache-{n}-of-2.safetensors" for n in (1, 2)]
    model = tiny_model(num_hidden_layers=2)
    with pytest.raises(ValueError, match="by one process: it holds one that 2 ranks saved, and so many must load it"):
        D2OCache.load(tmp_path, model)
    with pytest.raises(ValueError, match="holds a cache that 2 ranks saved: save this one to another folder"):
        read(model, CONFIGS["full"], *left_padded([40])).save(tmp_path)


@torch.no_grad()
def refused_on_ranks(rank: int, world: int, folder: str) -> None:
    model = tiny_model(num_hidden_layers=2)
    mesh, other = build_mesh(1, 2, 1), build_mesh(1, 1, 2)
    cache = D2OCache(model.config, CONFIGS["default"], mesh)
    model(**cache.deal(tokens(1, 40)), past_key_values=cache)
    cache.save(folder)
    assert D2OCache.load(folder, model, mesh).get_seq_length() == 40
    with pytest.raises(ValueError, match="saved by ranks of tp 1 and sp 2, and these have tp 2 and sp 1"):
        D2OCache.load(folder, model, other)
    with pytest.raises(ValueError, match="saved by ranks with sp_prefill ulysses, and these have ring"):
        D2OCache.load(folder, model, mesh, ParallelConfig(sp=2, sp_prefill="ring"))
    mine = Path(folder) / f"cache-{rank + 1}-of-2.safetensors"
    if rank:
        rewrite(mine, lambda said: said.update(save="another"))
    with pytest.raises(ValueError, match="rank 1 differs from rank 0 in when its part of the cache was saved"):
        D2OCache.load(folder, model, mesh)
    if rank:
        mine.unlink()
    with pytest.raises(ValueError, match="rank 1: no cache was saved in .* by 2 ranks: no cache-2-of-2.safetensors"):
        D2OCache.load(folder, model, mesh)


@pytest.mark.multirank
def test_what_fails_on_one_rank_is_raised_on_all(tmp_path):
    run_ranks(2, refused_on_ranks, str(tmp_path))
