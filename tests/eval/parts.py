"""What the tests of tasks share: a tokenizer, a text, and tools made of them."""

from __future__ import annotations

import gzip
import json

from d2o_dist.eval.encode import Encoder
from d2o_dist.eval.examples import Tools
from tests.engine.tiny import make_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog and keeps what it needs while others fold the rest into it".split()
SENTENCES = [f"{WORDS[i % 20].capitalize()} {WORDS[(7 * i + 3) % 20]} {WORDS[(3 * i) % 20]} {i}." for i in range(900)]
TEXT = " ".join(SENTENCES)


def make_tools(*, template: bool = False, seed: int = 0, max_positions: int | None = None) -> Tools:
    tokenizer = make_tokenizer(template=template)
    encoder = Encoder(tokenizer, max_positions=max_positions)
    return Tools(tokenizer, lambda name: TEXT, encoder.count, seed, max_positions)


def write(folder, task, rows, compress=False):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if compress:
        with gzip.open(folder / f"{task}.jsonl.gz", "wt") as file:
            file.write(text)
    else:
        (folder / f"{task}.jsonl").write_text(text)
