"""A rank that has no memory for a prompt, or for rows that join: its peers learn it, and the job goes on."""

from __future__ import annotations

import resource
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from d2o_dist.engine import runner as running
from d2o_dist.engine.session import Session
from tests.engine.test_many_ranks import PATIENCE_S, read, whole_run, write_config
from tests.engine.tiny import make_folder
from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank
GIB = 2**30


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A model, and the records of one process to which nothing happens."""
    folder = tmp_path_factory.mktemp("sound")
    values = write_config(make_folder(folder / "model"), folder, 1, 1, 1)
    run_ranks(1, whole_run, values)
    return folder / "model", read(values["output"])


def short_of_memory(rank, world, values):
    """As `whole_run`. The prompt of r2 needs 8 GiB; rank 1 may take no more than 2, and none for the first join."""
    reads, joins, real_read, real_join = [], [], running.InferRunner.read, Session.join
    if rank == 1:
        (taken,) = (int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * GIB, -1))

    def noted(self, requests):
        reads.append(requests[0].id)
        return real_read(self, requests)

    def memory_of(config, device):
        return lambda tokens: SimpleNamespace(beside_weights=8 * GIB if reads[-1] == "r2" else 1)

    def join(self, *others):
        joins.append(len(others))
        if rank == 1 and len(joins) == 1:
            raise torch.OutOfMemoryError("no room to join")
        real_join(self, *others)

    with (
        patch.object(running.InferRunner, "read", noted),
        patch.object(running, "memory_of", memory_of),
        patch.object(Session, "join", join),
    ):
        summary, _ = whole_run(rank, world, values)
    return summary.num_ok, summary.num_failed, reads, len(joins)


@pytest.mark.parametrize(("sp", "tp"), [(2, 1), (1, 2)])
def test_what_one_rank_has_no_memory_for_costs_one_row_at_most(sound, tmp_path, sp, tp):
    model, want = sound
    values = write_config(model, tmp_path, 1, sp, tp)
    many = run_ranks(2, short_of_memory, values, timeout_s=PATIENCE_S, fresh=True)
    assert many[0] == many[1]
    ok, failed, reads, joins = many[0]
    assert (ok, failed, joins > 1) == (4, 2, True)
    assert reads.count("r2") == 2 and len(reads) > 6  # beside others, then alone; those that could not join, too
    have = read(values["output"])
    assert have[2]["error"].startswith("rank 1: RuntimeError: ") and "allocate" in have[2]["error"]
    assert have[:2] + have[3:] == want[:2] + want[3:]
