"""Compiles the kernels that a call would launch, for GPUs that are not here, and reads what the compiler made of them.

Launches on meta tensors are recorded instead of run, so what is compiled is what the library's own code asks for: its
block sizes, warps, stages and argument types. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from d2o_dist.kernels import launch

# Bytes of shared memory that a block may use (CUDA programming guide, compute capabilities).
SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one GPU. local_bytes: what a thread keeps in (slow) local memory: spilled registers."""

    name: str
    capability: int
    registers: int
    shared_bytes: int
    local_bytes: int


@contextmanager
def _recorded() -> Iterator[list]:
    from triton.runtime.jit import JITFunction

    launches, original = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        assert all(0 < size < limit for size, limit in zip(grid, (1 << 31, 1 << 16, 1 << 16), strict=False)), grid
        launches.append((self, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_call(call: Callable[[], object], capabilities: tuple[int, ...]) -> list[Compiled]:
    """Every kernel that `call` (on meta tensors) launches, compiled for each GPU; equal launches once."""
    done: dict[str, Compiled] = {}
    for capability in capabilities:
        launch.assumed_capability = capability
        with _recorded() as launches:
            call()
        assert launches, "nothing was launched"
        for kernel, args, kwargs in launches:
            key = f"{kernel.__name__} {capability} {_describe(args)} {kwargs}"
            if key not in done:
                done[key] = _compile(kernel, args, kwargs, capability)
    return list(done.values())


def _describe(args: tuple) -> list:
    return [(x.dtype, tuple(x.shape)) if isinstance(x, torch.Tensor) else x for x in args]


def _compile(kernel, args: tuple, kwargs: dict, capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: kwargs[key] for key in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    named = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
    for index, parameter in enumerate(kernel.params):
        value, name = named[parameter.name], parameter.name
        if parameter.is_constexpr or value is None or (_specialized(parameter, value) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= value < (1 << 31) else "i64"
            if _specialized(parameter, value) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _usage(compiled.asm["cubin"])
    return Compiled(kernel.__name__, capability, shared_bytes=compiled.metadata.shared, **usage)


def _specialized(parameter, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory a thread, as the tool shipped with Triton reads them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "local_bytes": found["LOCAL"] + found["STACK"]}


def main() -> None:
    """Compile cases of `tests.kernels.compile_cases`, each NAME or NAME@CAPABILITY, and print one JSON line each."""
    from tests.kernels.compile_cases import CASES

    for asked in sys.argv[1:]:
        name, _, capability = asked.partition("@")
        for result in compile_call(CASES[name], (int(capability),) if capability else tuple(SHARED_LIMITS)):
            print(json.dumps({"case": name, **asdict(result)}), flush=True)


if __name__ == "__main__":
    main()
