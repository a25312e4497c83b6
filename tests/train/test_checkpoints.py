"""Checkpoints on disk: what is complete, what is deleted, and what is gone on from; without a model."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from d2o_dist.comm import Collectives, ParallelMesh, build_mesh
from d2o_dist.train import checkpoints as module
from d2o_dist.train.checkpoints import Checkpoints, RunState
from d2o_dist.train.export import replace_folder
from d2o_dist.train.manifest import MANIFEST, fault
from tests.ranks import run_ranks


def make(folder: Path, *steps: int, best: int | None = None) -> Checkpoints:
    """Checkpoints of those steps, saved one after the other; the best one is measured lowest."""
    found = Checkpoints(folder, Collectives(ParallelMesh.local().axis("world")))
    for step in steps:
        state = RunState(step, measured=1.0 if step == best else 2.0 + step)
        found.save(state, write, is_best=step == best)
    return found


def write(folder: Path) -> None:
    (folder / "shards").mkdir()
    (folder / "shards" / "weights").write_text("weights " * 100)


def there(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoints.folder.iterdir() if path.is_dir())


def folder_of(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.folder / f"step-{step:08d}"


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = [
    ("shards/weights", lose, "shards/weights is not there"),
    ("shards/weights", cut, "shards/weights has 5 bytes and not 800"),
    ("shards/weights", change, "shards/weights is not what was written"),
    ("state.json", cut, "state.json has 5 bytes and not"),
    (MANIFEST, lose, "manifest.json is not there"),
    (MANIFEST, cut, "manifest.json is damaged"),
]


@pytest.mark.parametrize(("name", "harm", "message"), DAMAGES)
def test_what_is_damaged_is_named_and_the_one_before_is_taken(tmp_path, name, harm, message):
    checkpoints = make(tmp_path, 1, 2, best=1)
    harm(folder_of(checkpoints, 2) / name)
    folder, note = checkpoints.resumable()
    assert folder == folder_of(checkpoints, 1)
    assert message in note and str(folder_of(checkpoints, 2)) in note and "step-00000001 is taken" in note
    assert "\n" not in note
    assert checkpoints.find() is None and there(checkpoints) == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "last is not there"),
        ("", "last names no checkpoint, it is empty"),
        ("../elsewhere\n", "last names no checkpoint ('../elsewhere')"),
        ("step-00000009\n", "last names step-00000009, which is not there"),
    ],
)
def test_without_its_pointer_the_newest_is_taken(tmp_path, text, message):
    checkpoints = make(tmp_path, 1, 2, best=1)
    pointer = tmp_path / "last"
    pointer.unlink() if text is None else pointer.write_text(text)
    folder, note = checkpoints.resumable()
    assert folder == folder_of(checkpoints, 2) and message in note and "step-00000002 is taken" in note


def test_nothing_is_begun_beside_checkpoints_of_which_none_is_complete(tmp_path):
    checkpoints = make(tmp_path, 1, 2, best=1)
    for step in (1, 2):
        cut(folder_of(checkpoints, step) / "shards" / "weights")
    with pytest.raises(ValueError, match=r"step-00000002/shards/weights has 5 .*step-00000001/shards.* is complete\. "):
        checkpoints.resumable()
    for step in (1, 2):
        shutil.rmtree(folder_of(checkpoints, step))
    with pytest.raises(ValueError, match="last names step-00000002, which is not there: no checkpoint in"):
        checkpoints.resumable()
    (tmp_path / "last").unlink()
    assert checkpoints.resumable() == (None, None)


def test_what_a_killed_first_save_left_is_no_checkpoint(tmp_path):
    (tmp_path / "unfinished-step-00000001").mkdir()
    checkpoints = make(tmp_path)
    assert checkpoints.resumable() == (None, None) and not checkpoints.any
    assert there(make(tmp_path, 1)) == [1]


def test_an_earlier_one_can_be_gone_on_from_and_nothing_newer_is_deleted(tmp_path):
    checkpoints = make(tmp_path, 1, 4, best=1)
    (tmp_path / "last").write_text("step-00000001\n")
    folder, note = checkpoints.resumable()
    assert folder == folder_of(checkpoints, 1)
    assert note == "step-00000004 is newer than step-00000001, which last names: it is not used"
    make(tmp_path, 2)
    assert there(checkpoints) == [1, 2, 4] and checkpoints.find() == folder_of(checkpoints, 2)
    make(tmp_path, 4)
    assert there(checkpoints) == [1, 4] and checkpoints.find() == folder_of(checkpoints, 4)


@pytest.mark.parametrize("harm", [lose, lambda path: path.write_text(""), lambda path: path.write_text("step-7\n")])
def test_the_best_one_is_not_deleted_if_its_pointer_is_lost(tmp_path, harm):
    checkpoints = make(tmp_path, 1, 2, best=1)
    harm(tmp_path / "best")
    make(tmp_path, 3)
    assert there(checkpoints) == [1, 3] and checkpoints.find("best") == folder_of(checkpoints, 1)


def test_nothing_is_deleted_for_one_that_was_not_finished(tmp_path, monkeypatch):
    checkpoints = make(tmp_path, 1, 2, best=1)

    def dies(*args):
        raise KeyboardInterrupt

    for name in ("seal", "_point", "_put"):
        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(module if name == "seal" else Checkpoints, name, dies)
            make(tmp_path, 3)
        assert fault(folder_of(checkpoints, 1)) is None and fault(folder_of(checkpoints, 2)) is None
        assert checkpoints.find() == folder_of(checkpoints, 2)
        assert checkpoints.find("best") == folder_of(checkpoints, 1)


def test_a_changed_byte_of_a_large_file_is_noticed(tmp_path):
    checkpoints = make(tmp_path, 1, best=1)

    def large(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(20 << 20))

    checkpoints.save(RunState(2), large, is_best=False)
    path = folder_of(checkpoints, 2) / "weights"
    with path.open("r+b") as file:
        file.seek(19 << 20)
        file.write(b"\1")
    folder, note = checkpoints.resumable()
    assert folder == folder_of(checkpoints, 1) and f"{path} is not what was written" in note


@pytest.mark.parametrize("is_best", [True, False], ids=["each is the best", "nothing is measured"])
def test_where_the_last_is_the_best_there_is_one_before_it(tmp_path, is_best):
    checkpoints = make(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(RunState(step, measured=-step if is_best else None), write, is_best=is_best)
    assert there(checkpoints) == [2, 3]
    change(folder_of(checkpoints, 3) / "shards" / "weights")
    folder, note = checkpoints.resumable()
    assert folder == folder_of(checkpoints, 2) and "step-00000003/shards/weights is not what was written" in note


def test_nothing_is_deleted_for_one_that_does_not_verify(tmp_path, monkeypatch):
    checkpoints = make(tmp_path, 1, 2, best=1)

    def spoils(self, scratch: Path, final: Path) -> None:
        scratch.rename(final)
        cut(final / "shards" / "weights")

    with monkeypatch.context() as broken:
        broken.setattr(Checkpoints, "_put", spoils)
        make(tmp_path, 3)
    assert there(checkpoints) == [1, 2, 3] and checkpoints.resumable()[0] == folder_of(checkpoints, 2)


def test_all_is_on_the_disk_before_it_has_its_name_and_before_anything_is_deleted(tmp_path, monkeypatch):
    checkpoints = make(tmp_path)
    events: list[tuple[str, str]] = []
    sync, rename, remove = os.fsync, Path.rename, shutil.rmtree

    def note(what: str, path: str) -> None:
        events.append((what, str(Path(path).relative_to(tmp_path))))

    monkeypatch.setattr(os, "fsync", lambda fd: (note("sync", os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (note("rename", self), rename(self, to)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (note("remove", path), remove(path, **how)))
    for step in (1, 2, 3):
        events.clear()
        checkpoints.save(RunState(step), write, is_best=False)
    scratch = "unfinished-step-00000003"
    named = events.index(("rename", scratch))
    inside = ("", "/state.json", "/manifest.json", "/shards", "/shards/weights")
    assert {("sync", scratch + name) for name in inside} <= set(events[:named])
    deleted = events.index(("remove", "step-00000001"))
    pointed = max(place for place, (_, name) in enumerate(events) if name.startswith("last."))
    assert ("sync", ".") in events[named:pointed] and ("sync", ".") in events[pointed:deleted]


def test_a_run_that_is_killed_at_any_moment_has_lost_nothing(tmp_path):
    done = 0
    for number in range(12):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                checkpoints, step = make(tmp_path), done
                while True:
                    step += 1
                    checkpoints.save(RunState(step, measured=float(step % 5)), write, is_best=step % 5 == 1)
                    os.write(writer, b"%d\n" % step)
            finally:
                os._exit(1)
        os.close(writer)
        draw = random.Random(number)
        with os.fdopen(reader) as told:
            heard = [told.readline() for _ in range(draw.randint(1, 4))]
            time.sleep(draw.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said = int([*heard, *told][-1])
        checkpoints = make(tmp_path)
        last, _ = checkpoints.resumable()
        assert Checkpoints.read(last).step in (said, said + 1)
        done = Checkpoints.read(last).step
        assert checkpoints.find("best") is not None and len(list(tmp_path.glob("step-*"))) >= min(done, 2)


def test_a_run_that_is_killed_while_it_exports_has_lost_neither_model(tmp_path, monkeypatch):
    new, folder, rename = tmp_path / ".model", tmp_path / "model", Path.rename
    for text in ("older", "newer"):
        new.mkdir()
        (new / "weights").write_text(text)
        if text == "older":
            replace_folder(new, folder)
    for moment in (1, 2):
        calls = iter(range(1, 9))

        def dies(self, to, moment=moment, calls=calls):
            if next(calls) == moment:
                raise KeyboardInterrupt
            return rename(self, to)

        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(Path, "rename", dies)
            replace_folder(new, folder)
        assert {path.read_text() for path in tmp_path.glob("*/weights")} == {"older", "newer"}
    replace_folder(new, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (folder / "weights").read_text() == "newer"


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "kept by hand").mkdir()
    make(tmp_path, 1, 2)
    assert (tmp_path / "kept by hand").is_dir()


def save_on_two_machines(rank: int, world: int, folder: Path) -> str:
    """Each rank has a folder of its own, as on machines that share no file system."""
    module._PATIENCE_S = 0.2
    checkpoints = Checkpoints(folder / f"machine{rank}", Collectives(build_mesh(dp=world).axis("world")))

    def shard(where: Path) -> None:
        where.mkdir(parents=True, exist_ok=True)
        (where / f"shard{rank}").write_text("weights")

    try:
        checkpoints.save(RunState(1), shard, is_best=False)
    except OSError as error:
        return str(error)
    return "saved"


@pytest.mark.multirank
def test_what_the_first_rank_does_not_see_is_no_checkpoint(tmp_path):
    found = run_ranks(2, save_on_two_machines, tmp_path, fresh=True)
    assert found[0] == found[1] and "rank 1 has written" in found[0] and "shard1, which rank 0 does not see" in found[0]
    assert not list(tmp_path.glob("machine*/step-*")) and not list(tmp_path.glob("machine*/last"))
