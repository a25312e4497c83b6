"""Documents: from files, folders or hub names, through `datasets`, to token ids.

Tokenized documents are cached by `datasets`, so that the ranks of a machine and later runs read them from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2o_dist.config.train_parts import DataConfig
from d2o_dist.fields.show import told_by
from d2o_dist.train.chat import chat_tokens

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


class Documents:
    """Tokenized documents, by number.

    Args:
        table: a `datasets.Dataset` with `input_ids`, `length` and, for conversations, `counted`.

    Attributes:
        lengths: [N] int64 tokens of each; all_counted: whether every token is a target.
    """

    def __init__(self, table: Any) -> None:
        self._table = table.with_format("numpy")
        self.all_counted = "counted" not in table.column_names
        self.lengths = np.asarray(table.with_format("numpy")["length"][:], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def piece(self, number: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """`(token ids, counted)` of tokens `[start, stop)` of a document: int64 and bool."""
        row = self._table[int(number)]
        ids = np.asarray(row["input_ids"][start:stop], dtype=np.int64)
        counted = np.ones(len(ids), bool) if self.all_counted else np.asarray(row["counted"][start:stop], dtype=bool)
        return ids, counted


def load_documents(source: str, split: str, config: DataConfig, tokenizer: Any) -> Documents:
    """Read and tokenize one source; see `DataConfig`.

    Raises:
        ValueError: the source does not exist or cannot be read, has no such field, or a row is not usable.
    """
    table = _open(source, split, config)
    is_chat = config.kind == "chat" or (config.kind == "auto" and config.messages_field in table.column_names)
    field = config.messages_field if is_chat else config.text_field
    if field not in table.column_names:
        raise ValueError(f'data: {source} has no field "{field}"; it has {", ".join(table.column_names)}')
    encode = _chat_encoder(tokenizer) if is_chat else _text_encoder(tokenizer)

    def rows(values: Sequence[Any], numbers: Sequence[int]) -> dict[str, list]:
        encoded = []
        for number, value in zip(numbers, values, strict=True):
            try:
                encoded.append(encode(value))
            except ValueError as error:
                raise ValueError(f"data: row {number} of {source}: {error}") from error
        ids, counted = zip(*encoded, strict=True)
        columns = {"input_ids": list(ids), "length": [len(row) for row in ids]}
        return columns | ({"counted": list(counted)} if is_chat else {})

    # What the result depends on, so that a cached one is found again: closures over tokenizers have no stable hash.
    table = table.map(
        rows, batched=True, with_indices=True, input_columns=[field], remove_columns=table.column_names,
        num_proc=config.num_workers, desc=f"tokenize {source}", new_fingerprint=_fingerprint(table, tokenizer, field),
    )  # fmt: skip
    return Documents(table)


def _fingerprint(table: Any, tokenizer: Any, field: str) -> str:
    from datasets.fingerprint import Hasher

    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return Hasher.hash([table._fingerprint, rules, str(tokenizer.chat_template), tokenizer.eos_token_id, field, 1])


def _text_encoder(tokenizer: Any) -> Callable[[Any], tuple[list[int], list[bool]]]:
    """Text as the tokenizer reads it, ended by the end-of-sequence token."""
    eos = tokenizer.eos_token_id

    def encode(text: Any) -> tuple[list[int], list[bool]]:
        if not isinstance(text, str):
            raise ValueError(f"a text must be a string, not {type(text).__name__}")
        ids = tokenizer(text, verbose=False)["input_ids"]
        ids = ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        return ids, [True] * len(ids)

    return encode


def _chat_encoder(tokenizer: Any) -> Callable[[Any], tuple[list[int], list[bool]]]:
    def encode(messages: Any) -> tuple[list[int], list[bool]]:
        return chat_tokens(tokenizer, messages)

    return encode


def _open(source: str, split: str, config: DataConfig) -> Any:
    import datasets

    path = Path(source).expanduser()
    try:
        if path.is_dir():
            if (path / "dataset_info.json").is_file():
                return datasets.load_from_disk(str(path))
            files = sorted(str(file) for file in path.iterdir() if file.suffix == ".txt")
            if not files:
                raise ValueError("the folder holds no .txt files and was not made by save_to_disk")
            return datasets.load_dataset("text", data_files=files, sample_by="document", split="train")
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise ValueError(f"a file must be one of {', '.join(sorted(_BUILDERS))}")
            extra = {"sample_by": "document"} if path.suffix == ".txt" else {}
            return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train", **extra)
        if source.startswith((".", "/", "~")) or path.suffix in _BUILDERS:
            raise ValueError("there is no such file or folder")
        return datasets.load_dataset(source, config.subset, split=split)
    except Exception as error:  # datasets raises what its readers raise; the first line says what
        raise ValueError(f"data: {source} cannot be read: {told_by(error.__cause__ or error)}") from error
