"""The texts that only judge: cut from files that you have, written as plain text, with the digest of each.

    python studies/unseen_texts.py runs/unseen_texts/texts --novel novel.txt.xz --code FOLDER \
        --chat valid_freq.json --logs loghub

The passages themselves are cut by the task `fidelity` (studies/unseen_texts.yaml, studies/answers.yaml): evenly over
each text, none twice. The texts are not in the repository; docs/results/unseen.md and answers.md say which bytes were
measured. No setting is ever chosen on them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from d2o_dist.eval.text import read_text


def second_half(path: Path) -> str:
    """What stands after the middle character of a text, from the next paragraph on."""
    text = read_text(path)
    return text[text.index("\n\n", len(text) // 2) :].lstrip()


def python_files(folder: Path) -> str:
    """The Python files right in a folder, in the order of their names, each after a line that names it."""
    files = sorted(folder.glob("*.py"))
    if not files:
        raise ValueError(f"code folder {folder} has no .py file")
    return "\n\n".join(f"# {file.name}\n{file.read_text(encoding='utf-8')}" for file in files)


def chat(path: Path) -> str:
    """Topical-Chat's conversations in the order of the file: a line a message, an empty line between conversations."""
    talks = json.loads(path.read_text(encoding="utf-8"))
    speaker = {"agent_1": "A", "agent_2": "B"}
    return "\n\n".join(
        "\n".join(f"{speaker[turn['agent']]}: {' '.join(turn['message'].split())}" for turn in talk["content"])
        for talk in talks.values()
    )


def logs(folder: Path) -> str:
    """Loghub's samples, `*_2k.log` in the folders of a checkout, in the order of their names."""
    files = sorted(folder.glob("*/*_2k.log"))
    if not files:
        raise ValueError(f"logs folder {folder} has no */*_2k.log")
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return "\n\n".join(text.replace("\r\n", "\n") for text in texts)


KINDS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "prose": ("novel", second_half),
    "code": ("code", python_files),
    "chat": ("chat", chat),
    "logs": ("logs", logs),
}


def main() -> None:
    """Write the texts whose sources are given, and print name, bytes and sha256 of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the texts")
    for flag, make in KINDS.values():
        parser.add_argument(f"--{flag}", type=Path, metavar="PATH", help=make.__doc__.splitlines()[0])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, (flag, make) in KINDS.items():
        source = getattr(args, flag)
        if source is None:
            continue
        try:
            data = make(source).encode()
        except (OSError, ValueError) as error:
            parser.error(f"--{flag}: {error}")
        (args.output / f"{name}.txt").write_bytes(data)
        print(f"{name}.txt  {len(data)} bytes  sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
