"""The demo's essays as files to train on: the first 85% of the text, and the rest held out.

    python -m launch.demo.corpus
"""

from __future__ import annotations

from pathlib import Path

from d2o_dist.eval.essays import essays
from d2o_dist.eval.fetch import cache_root, scratch_beside
from launch.demo.model import prepare_model

TRAIN_FRACTION = 0.85


def prepare_corpus(folder: Path | None = None) -> Path:
    """A folder with `train.txt` and `validation.txt`; default `<cache>/corpus`. The cut is between two paragraphs."""
    folder = cache_root() / "corpus" if folder is None else Path(folder)
    text = essays()
    cut = text.index("\n\n", int(len(text) * TRAIN_FRACTION))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", text[:cut]), ("validation", text[cut:].lstrip("\n"))):
        target = folder / f"{name}.txt"
        with scratch_beside(target) as scratch:
            made = scratch / target.name
            made.write_text(part, encoding="utf-8")
            made.replace(target)
    return folder


def main() -> None:
    """Prepare texts and model, and say where they are."""
    print(f"texts: {prepare_corpus()}")
    print(f"model: {prepare_model()}")


if __name__ == "__main__":
    main()
