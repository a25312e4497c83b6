"""The largest batch that fits, and tokens/s there: full cache against D2O, a whole model of real shape, random weights.

    python -m benchmarks largest --model llama3-8b --length 32768 --device cuda --out docs/benchmarks
    python -m benchmarks largest --model tiny --length 2048 --device cpu --dtype float32 --limit-mib 64

Prompts are read one at a time and held together, as a server would: one prompt is read and compressed, its row is
repeated, and the batch decodes. (Rows of different prompts take the same bytes.) A batch fits if all its steps run. On
CUDA memory says no; on a CPU weights and buffers of the cache are counted against --limit-mib.

Each cache is timed at batch 1, at the largest batch of the first one, and at its own largest.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import Cache, PreTrainedModel

from benchmarks.model import MODELS, build_model, check_gate, full_bytes, new_cache
from benchmarks.timing import machine, markdown_table, write_report
from d2o_dist.models.hf import D2OCache, run_model


class DoesNotFit(Exception):
    """A batch would take more memory than there is."""


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` for which `fits` holds, if it holds up to some batch and not above; 0 if for none.

    By doubling, then bisecting: about 2 log2(answer) trials.
    """
    if most < 1 or not fits(1):
        return 0
    low = 1
    while low < most and fits(min(2 * low, most)):
        low = min(2 * low, most)
    high = min(2 * low, most + 1)  # does not fit, or is beyond `most`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Trial:
    """Decoding at any batch from one prompt.

    Args:
        limit: bytes of weights and cache together; None: the device says when it is full.
    """

    def __init__(self, model: PreTrainedModel, preset: str, keep_ratio: float, length: int, limit: int | None) -> None:
        self.model, self.preset, self.keep_ratio, self.length, self.limit = model, preset, keep_ratio, length, limit
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters())

    @torch.inference_mode()
    def decode(self, batch: int, steps: int) -> tuple[float, int]:
        """Seconds of `steps` tokens of every row, and the bytes of the cache's buffers after them.

        Raises:
            DoesNotFit: the memory does not suffice.
        """
        try:
            return self._decode(batch, steps)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(str(error)) from None
        finally:
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _decode(self, batch: int, steps: int) -> tuple[float, int]:
        device = self.model.device
        cache = new_cache(self.model, self.preset, self.keep_ratio)
        ids = torch.randint(self.model.config.vocab_size, (1, self.length), device=device)
        token = run_model(self.model, ids, None, cache).argmax(-1, keepdim=True)
        if isinstance(cache, D2OCache):
            cache.finalize()
        self._check(batch * cache_bytes(cache))  # before it is made
        cache.batch_repeat_interleave(batch)
        token = token.repeat(batch, 1)
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            token = run_model(self.model, token, None, cache).argmax(-1, keepdim=True)
        _wait(device)
        seconds = time.perf_counter() - start
        self._check(cache_bytes(cache))
        return seconds, cache_bytes(cache)

    def _check(self, held: int) -> None:
        if self.limit is not None and self.weights + held > self.limit:
            raise DoesNotFit(f"{self.weights + held} bytes are more than {self.limit}")

    def fits(self, batch: int, steps: int) -> bool:
        """Whether `steps` tokens of every row can be decoded."""
        try:
            self.decode(batch, steps)
        except DoesNotFit:
            return False
        return True


def cache_bytes(cache: Cache) -> int:
    """Of all its buffers, room to grow and statistics included."""
    if isinstance(cache, D2OCache):
        return cache.report().allocated_bytes
    return full_bytes(cache)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b", choices=MODELS)
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--length", type=int, default=32768, help="prompt tokens of each row")
    parser.add_argument("--presets", default="sdpa,d2o,lean", help="the first is what the others are compared with")
    parser.add_argument("--keep-ratio", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=64, help="decoded tokens a row")
    parser.add_argument("--most", type=int, default=1024, help="rows at which the search ends")
    parser.add_argument("--limit-mib", type=int, help="weights and cache, in MiB: needed on a CPU")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="of PyTorch, on a CPU")
    parser.add_argument("--out", type=Path, help="write dated JSON and Markdown here")
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"device {args.device!r}: this machine has no CUDA device")
    if args.device == "cpu" and args.limit_mib is None:
        parser.error("--limit-mib is needed on a CPU: the machine would swap, or end the process, before it says no")
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build_model(args.model, args.layers, getattr(torch, args.dtype), args.device)
    limit = None if args.limit_mib is None else args.limit_mib << 20
    facts = {**machine(), "dtype": args.dtype, "layers": model.config.num_hidden_layers, "keep_ratio": args.keep_ratio}
    facts |= {"steps": args.steps, "limit, MiB": args.limit_mib, "error of logits": check_gate(model, args.device)}
    rows = compare(model, args.presets.split(","), args, limit)
    facts["load_1m at the end"] = machine()["load_1m"]
    print(*(f"{key}: {value}" for key, value in facts.items()), "", markdown_table(rows), sep="\n")
    if args.out:
        print(f"\nwritten: {write_report(args.out, 'largest', rows, facts)}")
    return 0


def compare(model: PreTrainedModel, presets: Sequence[str], args: argparse.Namespace, limit: int | None) -> list[dict]:
    """Rows of the table."""
    trials = {preset: Trial(model, preset, args.keep_ratio, args.length, limit) for preset in presets}
    # As many steps as are timed: a cache may grow until the last of them.
    most = {
        preset: largest_batch(lambda batch, trial=trial: trial.fits(batch, args.steps), args.most)
        for preset, trial in trials.items()
    }
    first = presets[0]
    rows, base = [], {}
    for where, batch_of in (
        ("1", lambda preset: min(1, most[preset])),
        (f"largest of {first}", lambda preset: min(most[first], most[preset])),
        ("its own largest", lambda preset: most[preset]),
    ):
        for preset, trial in trials.items():
            batch = batch_of(preset)
            row = {"model": args.model, "T": args.length, "cache": preset, "batch": where, "rows": batch}
            if batch == 0:
                rows.append(row | {"tokens/s": "does not fit", f"of {first}": "", "cache, MiB": ""})
                continue
            trial.decode(batch, 2)  # warm-up: kernels are compiled
            seconds, held = trial.decode(batch, args.steps)
            speed = batch * args.steps / seconds
            base.setdefault(where, speed if preset == first else None)
            ratio = f"{speed / base[where]:.2f}x" if base[where] else ""
            rows.append(
                row | {"tokens/s": f"{speed:.2f}", f"of {first}": ratio, "cache, MiB": f"{held / 2**20:.1f}"}
            )
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
