"""Evaluations whose methods read their prompts themselves."""

from __future__ import annotations

import pytest

from d2o_dist.comm import ParallelMesh
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.eval.evaluate import evaluate
from d2o_dist.eval.plan import EvalPlan, prepare
from d2o_dist.eval.store import read_records
from d2o_dist.models.hf.model import HFModel
from tests.engine.tiny import make_folder
from tests.eval.parts import TEXT

TASKS = [
    {"kind": "needle", "lengths": [200, 260], "depths": 2, "max_new_tokens": 6},
    {"kind": "fidelity", "lengths": [100], "num_scored": 20, "samples": 3},
]
LEAN = {"preset": "lean", "budget": {"min_layer_tokens": 8}}
BY_LAYER = {"name": "by layer", **LEAN, "reading": "layerwise"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), template=False, max_position_embeddings=640))


def plan_of(folder: str, output, methods) -> EvalPlan:
    values = {"model": folder, "output": str(output), "device": "cpu", "tasks": TASKS, "methods": methods,
              "keep_ratios": [0.3], "batch_size": 2, "prefill_chunk": 64}  # fmt: skip
    return prepare(EvalConfig.from_dict(values), {"essays": lambda: TEXT})


def test_layer_by_layer_of_budgets_that_are_known_is_whole(folder, tmp_path):
    """It keeps and answers the same; its results are its own."""
    evaluate(plan_of(folder, tmp_path, [{"name": "whole", **LEAN}, BY_LAYER]), ParallelMesh.local())
    found: dict = {"whole": {}, "by layer": {}, "full": {}}
    for record in read_records(tmp_path).values():
        assert record["error"] is None
        found[record.pop("method")][record["task"], record["row"]] = record
    assert len(found["whole"]) == len(found["by layer"]) == 7
    for row, record in found["by layer"].items():
        other = found["whole"][row]
        assert record.pop("key") != other.pop("key")
        assert record.pop("scores") == pytest.approx(other.pop("scores"), rel=0, abs=1e-9)
        assert record.pop("rank_bytes") > 0 < other.pop("rank_bytes")
        assert record == other


def test_a_reading_that_the_model_does_not_allow(folder, tmp_path, monkeypatch):
    """It is refused before a row is run."""
    monkeypatch.setattr(HFModel, "tile_refusal", "its layers are not called one by one")
    with pytest.raises(ValueError, match=r"reading \(layerwise\) needs a model that takes tiles, but its layers are"):
        evaluate(plan_of(folder, tmp_path, [BY_LAYER]), ParallelMesh.local())
