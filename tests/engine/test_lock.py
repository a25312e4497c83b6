"""One run at a time writes to an output: two processes, processes that end in every way, other machines."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from d2o_dist.comm import ParallelMesh, build_mesh
from d2o_dist.engine import lock as locking
from d2o_dist.engine.lock import OutputLock, only_writer
from d2o_dist.engine.output import lock_path
from tests.ranks import run_ranks, start_process


def holding(path, ends: bool, link) -> None:
    held = OutputLock("out", path)
    link.send("held")
    if ends:
        held.release()
    else:
        time.sleep(300)


def hold(path, ends: bool = False) -> multiprocessing.Process:
    """A process that has the lock when this returns."""
    here, there = multiprocessing.Pipe()
    process = start_process(holding, path, ends, there)
    assert here.recv() == "held"
    return process


def until(path) -> None:
    ends = time.monotonic() + 50
    while not path.exists():
        assert time.monotonic() < ends, path
        time.sleep(0.01)


def take_turns(rank: int, world: int, folder) -> list[str]:
    """Rank 0 holds the lock while rank 1 tries; then rank 1 gets it."""
    path, said = folder / "lock", []
    if rank == 0:
        held = OutputLock("out", path)
        (folder / "held").touch()
        until(folder / "tried")
        held.release()
        (folder / "released").touch()
        return [str(os.getpid())]
    until(folder / "held")
    try:
        OutputLock("out", path)
    except ValueError as error:
        said.append(str(error))
    (folder / "tried").touch()
    until(folder / "released")
    OutputLock("out", path).release()
    return said


def test_two_processes_take_turns(tmp_path):
    (pid,), (said,) = run_ranks(2, take_turns, tmp_path, init=False)
    assert said == (
        f"output out is written by process {pid} on {socket.gethostname()} now: wait for it, or name another output"
    )
    assert not (tmp_path / "lock").exists()


def crowd(rank: int, world: int, folder) -> int:
    """Times that this rank had the lock; while it has it, nobody else may."""
    had = 0
    for _ in range(30):
        try:
            held = OutputLock("out", folder / "lock")
        except ValueError:
            continue
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
        os.unlink(folder / "inside")
        held.release()
        had += 1
    return had


def test_a_crowd_never_meets_inside(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": socket.gethostname()}))
    assert sum(run_ranks(4, crowd, tmp_path, init=False)) > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_is_followed(tmp_path, number):
    path = tmp_path / "lock"
    process = hold(path)
    with pytest.raises(ValueError, match=f"written by process {process.pid} on"):
        OutputLock("out", path)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == -number
    assert path.exists() == (number == signal.SIGKILL)
    held = OutputLock("out", path)
    assert json.loads(path.read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    held.release()
    held.release()
    assert not path.exists()


def test_what_another_machine_touches_is_believed(tmp_path, monkeypatch):
    """And taken over once nobody touches it any more."""
    monkeypatch.setattr(locking, "_BEAT_S", 0.1)
    monkeypatch.setattr(locking, "_WATCH_S", 3.0)
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    touching, ended = threading.Event(), threading.Event()

    def touch() -> None:
        while not ended.wait(0.05):
            os.utime(path)
            touching.set()

    other = threading.Thread(target=touch)
    other.start()
    try:
        assert touching.wait(30)
        with pytest.raises(ValueError, match="written by process 7 on elsewhere now"):
            OutputLock("out", path)
        assert json.loads(path.read_text())["host"] == "elsewhere"
    finally:
        ended.set()
        other.join()
    held = OutputLock("out", path)
    assert json.loads(path.read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    held.release()
    assert not path.exists()


def test_a_holder_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "_BEAT_S", 0.05)
    path = tmp_path / "lock"
    held = OutputLock("out", path)
    os.utime(path, (1, 1))
    ends = time.monotonic() + 30
    while path.stat().st_mtime == 1:
        assert time.monotonic() < ends
        time.sleep(0.01)
    held.release()


def test_an_empty_file_is_used_and_left_empty(tmp_path, monkeypatch):
    """A process may have been killed as it made the file; or it is somebody's."""
    monkeypatch.setattr(locking, "_GRACE_S", 0.1)
    path = tmp_path / "lock"
    path.touch()
    held = OutputLock("out", path)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    held.release()
    assert path.read_text() == ""


def test_nobody_comes_between_who_makes_the_file_and_its_lock(tmp_path, monkeypatch):
    """Else the file stayed empty for ever, and each later run waited for a name in it."""
    path, flock, other = tmp_path / "lock", locking._flock, []

    def late() -> None:
        with pytest.raises(ValueError, match=f"written by process {os.getpid()} on"):
            OutputLock("out", path)
        other.append("was told who writes")

    thread = threading.Thread(target=late)

    def stalls(file: int) -> bool | None:
        monkeypatch.setattr(locking, "_flock", flock)
        thread.start()
        time.sleep(0.2)
        return flock(file)

    monkeypatch.setattr(locking, "_flock", stalls)
    held = OutputLock("out", path)
    thread.join(30)
    held.release()
    assert other == ["was told who writes"]
    assert not path.exists()


FOREIGN = ["{", "[]", '{"pid": "x", "host": "h"}', '{"pid": 1, "host": "h", "note": "mine"}', "my notes\n", " "]


@pytest.mark.parametrize("text", FOREIGN)
def test_a_file_that_no_run_wrote_is_refused_and_stays(tmp_path, monkeypatch, text):
    monkeypatch.setattr(locking, "_GRACE_S", 0.1)
    path = tmp_path / "lock"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} is no lock that a run has left: move it away"):
        OutputLock("out", path)
    assert path.read_text() == text


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
def test_what_is_no_file_is_refused_and_stays(tmp_path, kind):
    path, notes = tmp_path / "lock", tmp_path / "notes"
    if kind == "link":  # to a lock of somebody's run
        notes.write_text(json.dumps({"pid": 1, "host": socket.gethostname()}))
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}.get(kind, lambda: path.symlink_to(notes))
    make()
    before = os.lstat(path)
    with pytest.raises(ValueError, match="is no lock that a run has left"):
        OutputLock("out", path)
    assert os.path.samestat(os.lstat(path), before) and notes.exists() == (kind == "link")


def test_the_lock_of_another_run_is_not_deleted(tmp_path):
    """The folder was removed and made again while this run held its lock."""
    path = tmp_path / "lock"
    first = OutputLock("out", path)
    path.unlink()
    second = OutputLock("out", path)
    first.release()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    second.release()
    assert not path.exists()


def test_without_flock_the_process_is_looked_for(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "lock"
    held = OutputLock("out", path)
    with pytest.raises(ValueError, match=f"written by process {os.getpid()}"):
        OutputLock("out", path)
    held.release()
    process = hold(path, ends=True)
    process.join(30)
    assert process.exitcode == 0
    path.write_text(json.dumps({"pid": process.pid, "host": socket.gethostname()}))
    OutputLock("out", path).release()


def test_a_file_deleted_at_the_last_moment_is_made_again(tmp_path, monkeypatch):
    path, flock = tmp_path / "lock", locking._flock
    deleted = []

    def flock_and_delete(file):
        if not deleted:
            path.unlink()
            deleted.append(file)
        return flock(file)

    monkeypatch.setattr(locking, "_flock", flock_and_delete)
    held = OutputLock("out", path)
    assert deleted and json.loads(path.read_text())["pid"] == os.getpid()
    with pytest.raises(ValueError, match="is written by"):
        OutputLock("out", path)
    held.release()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output out cannot be locked: .*file"):
        OutputLock("out", tmp_path / "file" / "lock")


def test_outputs_that_need_none(tmp_path):
    assert lock_path(None) is lock_path("-") is lock_path("/dev/null") is None
    assert lock_path(str(tmp_path / "o.jsonl")) == tmp_path / "o.jsonl.lock"
    with only_writer("-", None, ParallelMesh.local()):
        assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_inside_lets_go(tmp_path):
    def check() -> None:
        assert (tmp_path / "lock").exists()
        raise ValueError("it is full")

    alone = ParallelMesh.local()
    with pytest.raises(ValueError, match="it is full"), only_writer("out", tmp_path / "lock", alone, check):
        raise AssertionError("nobody may enter")
    with pytest.raises(KeyError), only_writer("out", tmp_path / "lock", alone):
        raise KeyError("x")
    assert not (tmp_path / "lock").exists()


def enter(rank: int, world: int, path) -> str:
    try:
        with only_writer("out", path, build_mesh(dp=world)):
            assert path.exists()
            return "inside"
    except ValueError as error:
        return str(error)


@pytest.mark.multirank
def test_all_ranks_enter_or_none(tmp_path):
    path = tmp_path / "lock"
    held = OutputLock("out", path)
    found = run_ranks(2, enter, path)
    assert found[0] == found[1] and f"written by process {os.getpid()}" in found[0]
    held.release()
