"""Run the checks of one op, or of all, and print a JSON line for each: on a GPU, or interpreted on a CPU.

python -m benchmarks.checks --op decode_attention
TRITON_INTERPRET=1 python -m benchmarks.checks --device cpu
"""

import argparse
import json
import traceback
from collections.abc import Iterator, Sequence

import torch

from benchmarks.checks import Check, all_checks
from d2o_dist.kernels.launch import is_interpreted


def outcomes(checks: Sequence[Check], device: str) -> Iterator[dict[str, object]]:
    """What each check found, as plain values; one that raises is wrong, and its traceback is told."""
    for check in checks:
        outcome: dict[str, object] = {"op": check.op, "name": check.name, "right": False}
        try:
            result = check.run(device)
            outcome |= {"right": result.is_right, "errors": result.errors}
        except Exception:  # one broken kernel must not hide what the others do
            outcome["traceback"] = traceback.format_exc()
        yield outcome


def main(argv: Sequence[str] | None = None) -> int:
    known = all_checks()
    ops = sorted({check.op for check in known})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=ops, help="only this one")
    parser.add_argument("--skip", default="", help="leave out names that contain this, such as float16")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not is_interpreted():
        parser.error("on a CPU kernels only run interpreted: set TRITON_INTERPRET=1")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"device {args.device!r}: this machine has no CUDA device")
    checks = [check for check in known if args.op in (None, check.op)]
    if args.device == "cpu":
        checks = [check for check in checks if not check.needs_cuda]
    if args.skip:
        checks = [check for check in checks if args.skip not in check.name]
    wrong = 0
    for outcome in outcomes(checks, args.device):
        wrong += not outcome["right"]
        print(json.dumps(outcome), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
