"""Decode steps as CUDA graphs: where they are possible, and how they are captured."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from d2o_dist.comm.request import RequestRanks
from d2o_dist.models.shape import ModelShape

_logger = logging.getLogger(__name__)


def obstacle(shape: ModelShape, device: torch.device, ranks: RequestRanks) -> str | None:
    """Why decode steps of this model cannot be CUDA graphs, as far as it is known before any step; None if they can.

    Args:
        shape: of the model; device: where the model is; ranks: those that share a request.
    """
    if device.type != "cuda":
        return f"the model is on {device.type}, and CUDA graphs are of CUDA devices"
    if ranks.tp.size * ranks.sp.size > 1:
        return f"tp ({ranks.tp.size}) x sp ({ranks.sp.size}) ranks share a request, and collectives are not captured"
    if shape.has_dynamic_rope:
        return "its rotary embedding is of type dynamic, which is computed anew as the text grows"
    if shape.has_states:
        return "some of its layers keep a state (linear attention, Mamba, convolutions), and those were never captured"
    return None


def check_graph(mode: str, shape: ModelShape, device: torch.device, ranks: RequestRanks) -> str | None:
    """The obstacle, or None.

    Args:
        mode: `auto`, `always` or `never`.

    Raises:
        ValueError: `always` where there is one.
    """
    reason = obstacle(shape, device, ranks)
    if mode == "always" and reason is not None:
        raise ValueError(f"decode_graph (always) is impossible: {reason}")
    return reason


def graph_recorder(mode: str, shape: ModelShape, device: torch.device, ranks: RequestRanks) -> CudaGraphRecorder | None:
    """What records decode steps, or None where Python runs them. Which it is, and why, is logged once.

    Args, Raises: as `check_graph`.
    """
    reason = check_graph(mode, shape, device, ranks)
    if mode == "never":
        return None
    if reason is not None:
        _say(f"decode steps are run by Python, not as a CUDA graph: {reason}")
        return None
    _say("decode steps are CUDA graphs")
    return CudaGraphRecorder(device)


class CudaGraphRecorder:
    """Captures forwards as CUDA graphs. Each has a memory pool of its own, which is freed with its replay.

    Args:
        device: where the model and the cache are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def warm_up(self, run: Callable[[], Tensor]) -> tuple[Tensor, str | None]:
        """Run it on the stream that will capture, where kernels are compiled and workspaces are made.

        A forward that waits for the device (a `.item()`, experts chosen on the host) cannot be captured: that is found
        here, while it still does no harm.
        """
        current = torch.cuda.current_stream(self._device)
        side = _side_stream(current, self._device)
        before = torch.cuda.get_sync_debug_mode()
        side.wait_stream(current)
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(side):
            warnings.simplefilter("always")
            try:
                torch.cuda.set_sync_debug_mode("warn")
                result = run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        current.wait_stream(side)
        # The memory belongs to the other stream, which may reuse it only when this one is done with it.
        result.record_stream(current)
        waits = None
        for warning in caught:
            text = str(warning.message)
            if "synchronizing CUDA operation" in text:
                waits = f"its forward waits for the device ({warning.filename}:{warning.lineno})"
            elif "Synchronization debug mode" not in text:  # that the mode is a prototype
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result, waits

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture it; nothing runs until the replay.

        Raises:
            RuntimeError: CUDA refuses; it names the setting that does without. torch.OutOfMemoryError: as it comes.
        """
        graph = torch.cuda.CUDAGraph()
        side = _side_stream(torch.cuda.current_stream(self._device), self._device)
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=side):
                result = run()
        except torch.OutOfMemoryError:
            raise  # callers make batches smaller; a step without a graph needs the same memory
        except Exception as error:
            raise RuntimeError(
                "a decode step could not be captured as a CUDA graph; decode_graph=never does without. CUDA said: "
                f"{error}"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@cache
def _side_stream(current: torch.cuda.Stream, device: torch.device) -> torch.cuda.Stream:
    """The stream beside `current` on which steps are warmed up and captured: one, whatever the number of batches.

    PyTorch keeps a workspace of cuBLAS for every stream that ever multiplied (32 MiB on Hopper) until the process ends.
    """
    return torch.cuda.Stream(device)


@cache
def _say(message: str) -> None:
    _logger.info(message)
