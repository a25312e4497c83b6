"""Answer the rows of an evaluation with kvpress, token for token, in an environment of kvpress's own.

    python launch/evaluate.py --config studies/hidden.yaml --rows-to runs/rows.jsonl     # in ours
    python studies/kvpress_peer.py runs/rows.jsonl runs/kvpress.jsonl --model FOLDER --press kvzip snapkv
    python studies/peer_table.py --config studies/hidden.yaml runs/kvpress.jsonl         # in ours

Needs kvpress and transformers as kvpress pins it, nothing of this project. Answers that the file holds already are not
computed again, so an interrupted run goes on. docs/evaluation.md says how the environment is made.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    ExpectedAttentionPress,
    KVzipPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


class _KVzip(KVzipPress):
    """KVzip that scores a row once for all ratios, and may be told that the rows have no chat template."""

    templated = True
    kept_scores: Tensor | None = None

    def prepare(self, model: Any, tokenizer: Any, prev_postfix_size: int = 8) -> list[tuple[Tensor, Tensor]]:
        if not self.templated:  # as it does itself where the tokenizer has none
            self._suffix_ids = tokenizer.encode("\n", return_tensors="pt", add_special_tokens=False)
            self.prefix_length = self.start_idx = 0
        return super().prepare(model, tokenizer, prev_postfix_size)

    def compress_post(self, model: Any) -> None:
        self.kept_scores = self.score_val.clone()
        super().compress_post(model)

    def again(self, model: Any, ratio: float) -> None:
        """Mask what another ratio removes."""
        self.compression_ratio, self.score_val = ratio, self.kept_scores.clone()
        super().compress_post(model)


# Name -> removed fraction -> press, with its own defaults.
PRESSES: dict[str, Callable[[float], Any]] = {
    "kvzip": lambda ratio: _KVzip(compression_ratio=ratio),
    "kvzip+": lambda ratio: _KVzip(compression_ratio=ratio, kvzip_plus_normalization=True),
    "observed": lambda ratio: ObservedAttentionPress(compression_ratio=ratio),
    "snapkv": lambda ratio: SnapKVPress(compression_ratio=ratio),
    "adakv": lambda ratio: AdaKVPress(SnapKVPress(compression_ratio=ratio)),
    "tova": lambda ratio: TOVAPress(compression_ratio=ratio),
    "chunkkv": lambda ratio: ChunkKVPress(SnapKVPress(compression_ratio=ratio)),
    "expected": lambda ratio: ExpectedAttentionPress(compression_ratio=ratio),
    "streaming": lambda ratio: StreamingLLMPress(compression_ratio=ratio),
}
FULL = "full"


class Peer:
    """A model that answers rows over caches that kvpress compressed."""

    def __init__(self, path: str, dtype: str, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
        ends = self.model.generation_config.eos_token_id
        self.eos = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}

    def compress(self, row: dict, name: str, kept: Iterable[float]) -> Iterator[tuple[float, DynamicCache, Tensor]]:
        """(kept, cache, logits [n, V] of what was read) of each kept fraction. Presses that mask what they remove leave
        the masks in the model, so a cache must be used before the next one is asked for."""
        # The attention of all tokens is what observed attention ranks by; masks need another implementation.
        self.model.set_attn_implementation("eager" if name == "observed" else "sdpa")
        ids = self._ids(row["context"] + ([] if row["hidden"] else row.get("question", [])))
        shared = None
        for ratio in kept:
            if shared is not None:
                press, pristine, logits = shared
                press.again(self.model, 1 - ratio)
                yield ratio, copy.deepcopy(pristine), logits
                continue
            cache = DynamicCache()
            press = None if name == FULL else PRESSES[name](1 - ratio)
            if press is None:
                self._forget_masks()
                logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0]
            else:
                if isinstance(press, _KVzip):
                    press.templated = row.get("templated", False)
                with press(self.model):
                    logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0]
            if isinstance(press, _KVzip):
                shared = press, copy.deepcopy(cache), logits
            yield ratio, cache, logits

    def answer(self, row: dict, cache: DynamicCache, logits: Tensor) -> tuple[str, int]:
        """Text, and how many tokens were generated."""
        at = len(row["context"])
        if row["hidden"]:
            logits = self._read(row["question"], cache, at)
        at, made = at + len(row["question"]), []
        while True:
            made.append(int(logits[-1].argmax()))
            text = self.tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            stops = [text.find(stop) for stop in row["stop"] if stop in text]
            if stops or made[-1] in self.eos or len(made) == row["max_new_tokens"]:
                return text[: min(stops)] if stops else text, len(made)
            logits = self._read(made[-1:], cache, at + len(made) - 1)

    def predict(self, row: dict, cache: DynamicCache, logits: Tensor) -> Tensor:
        """Logits [n, V] of the continuation's tokens, in one forward over the compressed cache; of the first one before
        the compression."""
        rest = self._read(row["continuation"][:-1], cache, len(row["context"]), every=True)
        return torch.cat([logits[-1:], rest])

    def held(self, cache: DynamicCache, row: dict) -> float:
        """Slots that are held and not masked, of those of the full cache."""
        read = len(row["context"]) + (0 if row["hidden"] else len(row.get("question", [])))
        slots = full = 0
        for layer, block in zip(cache.layers, self.model.model.layers, strict=True):
            masked = getattr(block.self_attn, "masked_key_indices", None)
            heads = layer.keys.shape[1]
            slots += heads * layer.keys.shape[2] - (0 if masked is None else len(masked[0]))
            full += heads * read
        return slots / full

    def _read(self, tokens: list[int], cache: DynamicCache, at: int, *, every: bool = False) -> Tensor:
        ids = self._ids(tokens)
        positions = torch.arange(at, at + len(tokens), device=ids.device)[None]
        keep = 0 if every else 1
        return self.model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=keep).logits[0]

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.device)

    def _forget_masks(self) -> None:
        for block in self.model.model.layers:
            block.self_attn.masked_key_indices = None


def divergence(logits: Tensor, reference: Tensor, tokens: list[int]) -> dict[str, float]:
    """Means over the tokens: `nll`, `kl` to the reference, `top1` agreement with it."""
    mine, theirs = (x.float().log_softmax(-1) for x in (logits, reference))
    nll = -mine.gather(-1, torch.tensor(tokens, device=mine.device)[:, None]).mean()
    kl = kl_div(mine, theirs, reduction="batchmean", log_target=True)
    top1 = (mine.argmax(-1) == theirs.argmax(-1)).float().mean()
    return {"nll": float(nll), "kl": max(float(kl), 0.0), "top1": float(top1)}


def results(peer: Peer, row: dict, name: str, kept: list[float]) -> Iterator[dict]:
    """A record for each kept fraction."""
    reference = None
    if "continuation" in row:
        _, cache, logits = next(iter(peer.compress(row, FULL, [1.0])))
        reference = peer.predict(row, cache, logits)
    start = time.perf_counter()
    for ratio, cache, logits in peer.compress(row, name, kept):
        held = peer.held(cache, row)
        if reference is None:
            text, count = peer.answer(row, cache, logits)
            found = {"text": text, "num_new_tokens": count}
        else:
            scores = divergence(peer.predict(row, cache, logits), reference, row["continuation"])
            found = {"scores": scores}
        seconds, start = time.perf_counter() - start, time.perf_counter()
        about = {"task": row["task"], "row": row["row"], "digest": row["digest"], "method": f"kvpress {name}"}
        yield {**about, "keep_ratio": ratio, "achieved_keep_ratio": held, **found, "seconds": round(seconds, 3)}


def main() -> None:
    """Write what is missing, a line a row, press and kept fraction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="from launch/evaluate.py --rows-to")
    parser.add_argument("answers", type=Path, help="file that the records are added to")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--press", nargs="+", required=True, choices=[FULL, *PRESSES], metavar="NAME",
                        help=", ".join([FULL, *PRESSES]))  # fmt: skip
    parser.add_argument("--kept", nargs="+", type=float, help="kept fractions; by default those of the rows")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    lines = args.answers.read_text(encoding="utf-8").splitlines() if args.answers.exists() else []
    done = {(one["digest"], one["method"], one["keep_ratio"]) for one in map(json.loads, lines)}
    peer = Peer(args.model, args.dtype, args.device)
    with args.answers.open("a", encoding="utf-8") as file, torch.inference_mode():
        for row in rows:
            for name in args.press:
                kept = [1.0] if name == FULL else args.kept or row["keep_ratios"]
                missing = [ratio for ratio in kept if (row["digest"], f"kvpress {name}", ratio) not in done]
                for record in results(peer, row, name, missing) if missing else ():
                    file.write(json.dumps(record) + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
