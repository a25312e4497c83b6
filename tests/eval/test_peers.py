"""Rows for other programs, kvpress on the same rows, and a table of both. kvpress itself is a stand-in here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from d2o_dist.cli import evaluate as cli
from d2o_dist.comm import ParallelMesh
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.eval.evaluate import evaluate
from d2o_dist.eval.plan import prepare
from d2o_dist.eval.store import read_records
from d2o_dist.fields.io import dump_yaml
from tests.engine.tiny import make_folder
from tests.eval.parts import TEXT

STUDIES = Path(__file__).resolve().parents[2] / "studies"
PRESSES = ("AdaKVPress", "ChunkKVPress", "ExpectedAttentionPress", "KVzipPress", "ObservedAttentionPress",
           "SnapKVPress", "StreamingLLMPress", "TOVAPress")  # fmt: skip


@dataclasses.dataclass
class Newest:
    """A press that keeps the newest tokens: what a press does to a cache, and nothing else."""

    compression_ratio: float = 0.0

    @contextmanager
    def __call__(self, model):
        found = []
        hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs["past_key_values"]), with_kwargs=True
        )
        yield
        hook.remove()
        for layer in found[0].layers:
            count = int(layer.keys.shape[2] * (1 - self.compression_ratio))
            layer.keys, layer.values = layer.keys[:, :, -count:], layer.values[:, :, -count:]


@pytest.fixture
def script(monkeypatch):
    """A script of `studies/` as a module."""
    kvpress = ModuleType("kvpress")
    for name in PRESSES:
        setattr(kvpress, name, Newest)
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look it up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), template=False))


@pytest.mark.parametrize("question", ["hidden", "visible"])
def test_a_peer_answers_our_rows(question, folder, tmp_path, script, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    text = str(tmp_path / "text.txt")
    values = {
        "model": folder, "output": str(tmp_path / "out"), "device": "cpu", "keep_ratios": [0.5], "question": question,
        "methods": [{"name": "own", "preset": "streaming", "budget": {"min_layer_tokens": 8}}],
        "tasks": [
            {"kind": "needle", "lengths": [200], "depths": 2, "max_new_tokens": 6, "haystack": text},
            {"kind": "fidelity", "lengths": [64], "num_scored": 8, "samples": 1, "text": text},
        ],
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(dump_yaml(values))
    config, rows, answers = (str(tmp_path / name) for name in ("c.yaml", "new/rows.jsonl", "answers.jsonl"))
    assert cli.main(["--config", config, "--rows-to", rows]) == 0 and not (tmp_path / "out").exists()
    capsys.readouterr()
    plan = prepare(EvalConfig.from_dict(values), {})
    found = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    for row, job in zip(found, plan.jobs, strict=True):
        assert (row["task"], row["row"], row["digest"]) == (job.task.name, job.row.id, job.digest)
        ids = row["context"] + row.get("question", row.get("continuation", []))
        assert tuple(ids) == (job.row.tokens if job.encoded is None else job.encoded.ids)
        assert row["hidden"] == (question == "hidden" and job.encoded is not None)
    monkeypatch.setattr(sys, "argv", ["kvpress_peer.py", rows, answers, "--model", folder, "--dtype", "float64",
                                      "--press", "full", "snapkv"])  # fmt: skip
    peer = script("kvpress_peer")
    peer.main()
    written = Path(answers).read_text()
    peer.main()  # nothing is missing
    assert Path(answers).read_text() == written
    evaluate(plan, ParallelMesh.local())
    ours = {(one["row"], one["method"]): one for one in read_records(tmp_path / "out").values()}
    theirs = {(one["row"], one["method"]): one for one in map(json.loads, written.splitlines())}
    assert len(theirs) == 6
    for job in plan.jobs:
        full, same = ours[job.row.id, "full"], theirs[job.row.id, "kvpress full"]
        assert same["achieved_keep_ratio"] == 1 and theirs[job.row.id, "kvpress snapkv"]["achieved_keep_ratio"] < 0.51
        if job.encoded is None:
            assert same["scores"] == pytest.approx(full["scores"], abs=1e-5)
            assert theirs[job.row.id, "kvpress snapkv"]["scores"]["kl"] > 1e-3
        else:
            assert (same["text"], same["num_new_tokens"]) == (full["text"], full["num_new_tokens"])
    table = script("peer_table")
    flags = ["peer_table.py", "--config", config, "--answers", answers, "--reference"]
    monkeypatch.setattr(sys, "argv", [*flags, "own"])
    assert table.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("| kvpress full | 100% | 1.0000 |") == 2 and printed.count("| kvpress snapkv | 50% | 0.") == 2
    monkeypatch.setattr(sys, "argv", [*flags, "another"])
    assert table.main() == 2 and "reference (another)" in capsys.readouterr().err


def test_divergence_is_that_of_an_evaluation(script):
    from d2o_dist.eval.continuation import compare

    logits, reference = torch.randn(2, 1, 9, 17, generator=torch.Generator().manual_seed(1)).unbind()
    tokens = list(range(9))
    found = script("kvpress_peer").divergence(logits[0], reference[0], tokens)
    assert found == pytest.approx(compare(logits, reference, [tokens])[0], abs=1e-6)
