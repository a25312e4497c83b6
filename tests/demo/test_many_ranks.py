"""The demo as ranks of one job: the same answers, and an end for all where one cannot go on."""

from __future__ import annotations

import pytest

from d2o_dist.eval.fetch import FetchError
from launch.demo import __main__ as demo
from tests.cli.speak import speak
from tests.engine.tiny import make_folder
from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=4096))


def run_demo(rank, world, folder, argv):
    demo.prepare_model = lambda: folder
    demo.essays = lambda: " ".join(f"Sentence {n} is about {n % 7} dogs and the quick brown fox." for n in range(400))
    return speak(demo.main, argv)


def test_the_demo_on_two_ranks_answers_as_on_one(folder):
    argv = ["--tokens", "700", "--max-new-tokens", "6"]
    (alone,) = run_ranks(1, run_demo, folder, argv, fresh=True)
    first, second = run_ranks(2, run_demo, folder, argv, fresh=True)
    assert (alone[0], first[0], second[0]) == (0, 0, 0) and second[1] == ""

    def answers(said: str) -> list[str]:
        return [line for line in said.splitlines() if line[:2] == "  " and ("right" in line or "wrong" in line)]

    assert len(answers(alone[1])) == 3 * 4 and answers(first[1]) == answers(alone[1])
    assert "on 1 rank\n" in alone[1] and "on 2 ranks\n" in first[1]


def without_network(rank, world):
    def prepare_model():
        raise FetchError("no index")

    demo.prepare_model = prepare_model
    return speak(demo.main, [])


def test_a_demo_that_cannot_be_fetched_ends_all_ranks():
    first, second = run_ranks(2, without_network, fresh=True)
    assert first == (2, "", "demo: error: no index\n") and second == (2, "", "")
