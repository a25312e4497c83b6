"""Prompts that would not fit: refused by the planner's arithmetic, row by row, before weights are loaded."""

from __future__ import annotations

import torch

from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.encode import BadRow, Request
from d2o_dist.engine.room import TOLERANCE, memory_comment, memory_of, refuse_too_long
from tests.engine.tiny import make_folder

CPU = torch.device("cpu")


def test_only_rows_that_do_not_fit_are_refused(tmp_path):
    config = InferConfig(model=str(make_folder(tmp_path)), device="cpu")
    memory = memory_of(config, CPU)
    rows = [Request(n, f"r{n}", (5,) * count, 8) for n, count in enumerate((40, 200, 100))] + [BadRow(3, "bad", "no")]
    room = int(memory(100).peak / TOLERANCE) + 1
    assert refuse_too_long(rows, config, CPU) == rows
    one, two, three, four = refuse_too_long(rows, config, CPU, room)
    assert [one, three, four] == [rows[0], rows[2], rows[3]]
    assert (two.index, two.id, two.num_prompt_tokens) == (1, "r1", 200)
    assert two.error.startswith("the prompt has 200 tokens, which need ") and "read layerwise (weights " in two.error
    assert f"and cpu has {room / 2**30:.2f} GiB: keep less, or let more ranks share it" in two.error


def test_reading_layer_by_layer_needs_less(tmp_path):
    folder = str(make_folder(tmp_path, num_hidden_layers=8, max_position_embeddings=100_000))
    whole, layerwise = (
        memory_of(InferConfig(model=folder, device="cpu", reading=reading, prefill_chunk=512), CPU)(50_000)
        for reading in ("whole", "layerwise")
    )
    assert layerwise.peak < whole.peak and layerwise.weights == whole.weights
    said = memory_comment(InferConfig(model=folder, device="cpu", reading="layerwise", max_prompt_tokens=777))
    assert said.startswith("# memory of a prompt of 777 tokens: ") and "\n# with reading=whole: " in said
    assert "\n# budget.rule is uniform with this model, whose 8 layers with full attention are few\n" in said
    assert memory_comment(InferConfig(model=folder + "/none", device="cpu")).startswith("# memory: not known: ")
