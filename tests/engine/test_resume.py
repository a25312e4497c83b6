"""Going on with a job: what is run again, what is refused, and what stays where a run cannot write."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest

from d2o_dist.engine import output as outputs
from d2o_dist.engine.kept import KeptFile
from d2o_dist.engine.plan import prepare
from d2o_dist.engine.records import RecordWriter
from d2o_dist.engine.runner import run
from d2o_dist.engine.stop import Stop, StoppedError
from d2o_dist.models import loading
from tests.engine.test_runner import ROWS, failing, folder, make_config, read, write_rows  # noqa: F401  a fixture

SAMPLING = {"max_new_tokens": 6, "temperature": 0.9, "seed": 3}


@pytest.fixture
def config(folder, tmp_path):  # noqa: F811
    return make_config(folder, tmp_path, ROWS, sampling=SAMPLING, max_batch_size=2)


def again(config, **fields):
    """Another run of the job, from the beginning."""
    config = dataclasses.replace(config, **fields)
    return run(config, prepare(config))


def stopped(config, after: int) -> StoppedError:
    """A run that is asked to stop at its choice number `after` of next tokens."""
    stop, choices = Stop(), []
    real = loading.load_model

    def count(*args) -> None:
        choices.append(args)
        if len(choices) == after:
            stop.ask(75, "TEST")

    def load(*args):
        model = real(*args)
        model.model.register_forward_hook(count)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", load)
        with pytest.raises(StoppedError) as caught:
            run(config, prepare(config), stop=stop)
    return caught.value


def whole(config, tmp_path) -> bytes:
    again(config, output=str(tmp_path / "whole.jsonl"))
    return (tmp_path / "whole.jsonl").read_bytes()


def test_a_stop_ends_the_running_step_and_finished_rows_stay(config, tmp_path):
    """Two rows a batch and six tokens a row: the ninth step is in the second batch."""
    want = whole(config, tmp_path)
    ended = stopped(config, 9)
    assert ended.status == 75
    assert str(ended) == "stopped (TEST); 2 of 7 rows are done and stay: the same command goes on"
    assert len(read(tmp_path)) == 2
    counts = []
    assert run(config, prepare(config), on_rows=counts.append).num_earlier == 2
    assert (tmp_path / "out.jsonl").read_bytes() == want and sum(counts) == 7


def test_rows_of_the_running_batch_that_are_done_stay(config, tmp_path):
    """The first of two rows is at its end when the second is stopped."""
    rows = [{**row, "max_new_tokens": 2 + 4 * n} for n, row in enumerate(ROWS[:2])]
    write_rows(tmp_path / "p.jsonl", rows)
    want = whole(config, tmp_path)
    stopped(config, 4)
    assert [record["id"] for record in read(tmp_path)] == ["r0"]
    again(config)
    assert (tmp_path / "out.jsonl").read_bytes() == want


def test_a_stop_before_the_first_batch_runs_nothing(config, tmp_path):
    stop = Stop()
    stop.ask(75, "TEST")
    with pytest.raises(StoppedError, match="0 of 7 rows are done"):
        run(config, prepare(config), stop=stop)
    assert read(tmp_path) == []


def test_a_job_that_is_done_loads_no_weights(config, tmp_path, monkeypatch):
    want = whole(config, tmp_path)
    again(config)
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("loaded"))
    summary = again(config, max_batch_size=7, device="auto")  # how it is computed may differ
    assert (summary.num_ok, summary.num_earlier, summary.num_new_tokens) == (7, 7, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == want


def test_failed_rows_are_tried_again_by_choice(config, tmp_path, monkeypatch):
    want = whole(config, tmp_path)
    with monkeypatch.context() as patch:
        failing(patch, lambda requests: ValueError("odd") if any(r.id in ("r2", "r5") for r in requests) else None)
        assert again(config).num_failed == 2
    assert again(config).num_failed == 2
    summary = again(config, retry_failed=True)
    assert (summary.num_failed, summary.num_earlier) == (0, 5)
    assert (tmp_path / "out.jsonl").read_bytes() == want


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"sampling": {**SAMPLING, "seed": 4}}, r"sampling.seed \(3, not 4\)"),
        (
            {"d2o": {"keep_ratio": 0.5, "budget": {"min_layers": 0, "min_layer_tokens": 8}}},
            r"d2o.keep_ratio \(0.4, not 0.5\)",
        ),
        ({"dtype": "float32"}, r"dtype \(auto, not float32\)"),
        ({"parallel": {"merge_scope": "local"}}, r"parallel.cache_layout \(None, not auto\), .* and \d more"),
    ],
)
def test_rows_of_other_settings_are_not_mixed(config, folder, tmp_path, fields, what):  # noqa: F811
    again(config)
    before = (tmp_path / "out.jsonl").read_bytes()
    other = make_config(folder, tmp_path, ROWS, **{"sampling": SAMPLING, **fields})
    with pytest.raises(ValueError, match=rf"holds rows of another job, by {what}: name another output"):
        prepare(other)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert again(other, overwrite=True).num_earlier == 0


def test_rows_of_other_prompts_or_weights_are_not_mixed(config, folder, tmp_path):  # noqa: F811
    again(config)
    write_rows(tmp_path / "p.jsonl", ROWS[1:])
    with pytest.raises(ValueError, match="holds rows of another job, by the prompts: name"):
        prepare(config)
    write_rows(tmp_path / "p.jsonl", ROWS)
    from tests.engine.tiny import make_folder

    other = make_folder(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="holds rows of another job, by model.safetensors: name"):
        prepare(dataclasses.replace(config, model=str(other)))


@pytest.mark.parametrize("how", ["resume=false", "no job", "foreign job", "foreign output"])
def test_what_is_refused_stays(config, tmp_path, how):
    again(config)
    job, output = tmp_path / "out.jsonl.job", tmp_path / "out.jsonl"
    words = "exists: delete it, name another, or set overwrite=true"
    if how == "no job":
        job.unlink()
    elif how == "foreign job":
        job.write_text('{"mine": 1}')
        words = "out.jsonl.job is not what a run says of its job: move it away"
    elif how == "foreign output":
        output.write_text("my notes\n")
        words = "holds something else than the rows of this job: move it away"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=words):
        again(config, resume=how != "resume=false")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_job_that_is_started_again_does_not_overwrite_its_own_rows(config, tmp_path, monkeypatch, variable):
    config = dataclasses.replace(config, overwrite=True)
    stopped(config, 9)
    with monkeypatch.context() as patch:
        patch.setenv(variable, "1")
        assert again(config).num_earlier == 2
        # Another job's are overwritten, as they are at the first start.
        assert again(dataclasses.replace(config, dtype="float32")).num_earlier == 0
    assert again(config).num_earlier == 0


def no_room(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_rows_that_only_lacked_room_to_be_sorted_are_not_lost(config, tmp_path, monkeypatch):
    want = whole(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "replace_text", no_room)
        summary = again(config)
    output = tmp_path / "out.jsonl"
    assert summary.num_ok == 7 and summary.lost == (
        f"output {output} cannot be put in order: No space left on device; its rows are in {output}, as they were "
        "finished: the same command goes on when there is room",
    )
    assert len(read(tmp_path)) == 7 and output.read_bytes() != want
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("loaded"))
    assert again(config).num_earlier == 7 and output.read_bytes() == want


def test_a_disk_that_is_full_ends_the_run_with_its_rows(config, tmp_path, monkeypatch):
    want, writes, real = whole(config, tmp_path), [], RecordWriter.write

    def write(self, records):
        writes.append(records)
        if len(writes) == 3:
            no_room()
        real(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write)
        with pytest.raises(StoppedError) as caught:
            again(config)
    assert caught.value.status == 1 and str(caught.value) == (
        f"error: output {tmp_path / 'out.jsonl'} cannot be written: No space left on device; 4 of 7 rows are done and "
        "stay: the same command goes on when there is room"
    )
    assert again(config).num_earlier == 4 and (tmp_path / "out.jsonl").read_bytes() == want


def test_what_there_is_no_room_for_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    kept = KeptFile(path, lambda number: tmp_path / f"spare{number}")
    kept.write(["one\n"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="No space left"):
            kept.write(["two\n"])
    assert path.read_text() == "one\n"
    kept.write(["three\n"])
    kept.close()
    assert path.read_text() == "one\nthree\n" and kept.lost is None and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_of_a_file_goes(config, tmp_path):
    (tmp_path / "out.jsonl.0123456789abcdef.new").write_text('{"id": "half')
    (tmp_path / "out.jsonl.mine.new").write_text("mine")
    again(config)
    assert not (tmp_path / "out.jsonl.0123456789abcdef.new").exists()
    assert (tmp_path / "out.jsonl.mine.new").read_text() == "mine"


def test_results_are_put_on_the_disk_with_their_names(config, tmp_path, monkeypatch):
    """Contents and folders are synchronized; the last is the folder, after the output got its name."""
    synced, real = [], os.fsync

    def fsync(number):
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    again(config)
    assert synced[-1] == str(tmp_path) and synced[-2].endswith(".new")
    assert synced.count(str(tmp_path / "out.jsonl")) == 4  # once a batch
    assert json.loads((tmp_path / "out.jsonl.job").read_text())["settings"]["sampling.seed"] == 3


def test_a_device_that_is_full(config):
    words = "^error: output /dev/full cannot be written: No space left on device; 0 of 7 rows are done$"
    with pytest.raises(StoppedError, match=words):
        again(config, output="/dev/full")
