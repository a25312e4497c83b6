"""Plain values between ranks: what is sent arrives, of the same kind, and nothing that arrives is run."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from d2o_dist.comm import Collectives, ParallelMesh
from d2o_dist.comm.objects import from_bytes, to_bytes

VALUES = [
    None, True, 0, -(10**40), 0.1, "text", "", "\ud800 ü\n", [], (), {}, [1, (2, [3, ()])], (None, {"a": (1,)}),
    {("metric", "none"): [(0.5, 3), (0.25, 4)], 7: {"tuple": 1}, "dict": [["a"]]}, math.inf,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_is_sent_arrives_of_the_same_kind(value):
    assert repr(from_bytes(to_bytes(value))) == repr(value)


def test_numbers_of_numpy_arrive_as_numbers():
    found = from_bytes(to_bytes([np.int64(3), np.float64(0.5), np.bool_(True), np.float32("nan")]))
    assert found[:3] == [3, 0.5, True] and math.isnan(found[3])
    assert [type(one) for one in found] == [int, float, bool, float]


@pytest.mark.parametrize("value", [{1}, Path("a"), torch.ones(2), np.ones(2), b"x", [len], {"a": {1}}], ids=repr)
def test_anything_else_is_refused_on_one_rank_too(value):
    comm = Collectives(ParallelMesh.local().axis("world"))
    for send in (comm.broadcast_object, comm.all_gather_object):
        with pytest.raises(TypeError, match="does not travel between ranks"):
            send(value)


class Program:
    """As a pickle, it writes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_not_run(tmp_path):
    with pytest.raises(ValueError):
        from_bytes(torch.frombuffer(bytearray(pickle.dumps(Program(tmp_path / "ran"))), dtype=torch.uint8))
    assert not (tmp_path / "ran").exists()
