"""What the recorder of CUDA graphs asks of CUDA, and what it says where CUDA refuses."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch

from d2o_dist.engine.cuda_graph import CudaGraphRecorder


class FakeCuda:
    """`torch.cuda` as far as the recorder calls it: what was called, in order."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[str] = []
        self.mode = 0
        self.num_side_streams = 0
        self.graph_fails = False
        cuda, fake = torch.cuda, self

        class Stream:
            def __init__(self, device=None) -> None:
                self.name = "side" if device is not None else "current"
                fake.num_side_streams += device is not None

            def wait_stream(self, other) -> None:
                fake.calls.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                fake.calls.append("replay")

        @contextmanager
        def inside(name: str):
            fake.calls.append(f"enter {name}")
            yield
            fake.calls.append(f"leave {name}")
            if name == "graph" and fake.graph_fails:
                raise RuntimeError("capture was invalidated")

        current = Stream()
        monkeypatch.setattr(cuda, "Stream", Stream)
        monkeypatch.setattr(cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(cuda, "stream", lambda stream: inside(stream.name))
        monkeypatch.setattr(cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(cuda, "graph", lambda graph, stream: inside("graph"))
        monkeypatch.setattr(cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(cuda, "set_sync_debug_mode", self._set_mode)

    def _set_mode(self, mode) -> None:
        self.mode = mode
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)


class FakeResult:
    """A tensor of a device."""

    def record_stream(self, stream) -> None:
        self.stream = stream.name


def test_what_the_recorder_asks_of_cuda(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    recorder = CudaGraphRecorder(torch.device("cuda", 0))
    result = FakeResult()
    assert recorder.warm_up(lambda: result) == (result, None)
    assert cuda.calls == ["side waits for current", "enter side", "leave side", "current waits for side"]
    assert result.stream == "current" and cuda.mode == 0
    cuda.calls.clear()
    replay = recorder.record(lambda: cuda.calls.append("run") or result)
    assert replay() is replay() is result
    assert cuda.calls == ["enter graph", "run", "leave graph", "replay", "replay"]


def test_batches_share_a_stream(monkeypatch):
    """cuBLAS keeps a workspace for each stream that it meets: a stream a batch would add them up."""
    cuda = FakeCuda(monkeypatch)
    for _ in range(3):
        recorder = CudaGraphRecorder(torch.device("cuda", 0))
        recorder.warm_up(FakeResult)
        recorder.record(FakeResult)
    assert cuda.num_side_streams == 1


def test_a_wait_is_seen_in_the_warm_up_and_other_warnings_stay_warnings(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    recorder = CudaGraphRecorder(torch.device("cuda", 0))

    def run():
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", FutureWarning, stacklevel=1)
        return FakeResult()

    with pytest.warns(FutureWarning, match="something else") as told:
        _, found = recorder.warm_up(run)
    assert len(told) == 1 and "its forward waits for the device (" in found and "test_recorder.py" in found

    def fail():
        raise KeyError("x")

    with pytest.raises(KeyError):
        recorder.warm_up(fail)
    assert cuda.mode == 0, "the mode is the process's, and was given back"


def test_a_capture_that_cuda_refuses_names_the_way_out(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    cuda.graph_fails = True
    with pytest.raises(RuntimeError, match="decode_graph=never does without. CUDA said: capture was invalidated"):
        CudaGraphRecorder(torch.device("cuda", 0)).record(FakeResult)


def test_a_capture_for_which_memory_is_short_says_that(monkeypatch):
    """Who tries a smaller batch then looks for this error, and for no other."""
    FakeCuda(monkeypatch)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory"):
        CudaGraphRecorder(torch.device("cuda", 0)).record(full)
