"""`launch/lm_harness.py`: the command line of lm-evaluation-harness, to which `--model d2o_dist` is known."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

from d2o_dist.cli.voice import speaks_of
from d2o_dist.comm.launch import read_environment


def forget_script_folder() -> None:
    """Take the launcher's folder off the import path, where Python puts it first.

    The harness imports a package `evaluate`, and would find `launch/evaluate.py` instead.
    """
    folder = Path(sys.argv[0]).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]


def with_device(arguments: list[str], has_cuda: bool) -> list[str]:
    """The arguments with `--device cpu` where nothing names a device: the harness then means `cuda:0`."""
    named = any(each.split("=")[0] in ("--device", "--config", "-C") for each in arguments)
    if has_cuda or named or not any(each.split("=")[0] == "--model" for each in arguments):
        return arguments
    print("lm_harness.py: there is no CUDA device, and --device is not given: --device cpu", file=sys.stderr)
    return [*arguments, "--device", "cpu"]


def main() -> int:
    """Register the model and hand over to the harness, which reads the command line."""
    forget_script_folder()
    try:
        from lm_eval.__main__ import cli_evaluate

        from d2o_dist.eval.lm_eval import D2OLM, register
    except ImportError as error:
        print(f"lm_harness.py: error: this needs lm-eval (pip install lm-eval): {error}", file=sys.stderr)
        return 2
    register()
    sys.argv[1:] = with_device(sys.argv[1:], torch.cuda.is_available())
    try:
        cli_evaluate()
    except ValueError as error:
        # What is wrong with the model or its arguments is one line. The harness's own errors are the harness's.
        if all(frame.f_code is not D2OLM.__init__.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        if speaks_of(error, read_environment(), met=False):
            print(f"lm_harness.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
