"""A tiny model folder with a tokenizer of its own, and a stand-in tokenizer where text does not matter."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from d2o_dist.engine.encode import Request
from tests.models import tiny_model

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "a cache keeps what it needs and folds the rest into it",
    "user assistant system: one two three four five six seven",
    "Grüße aus Köln, naïve café, 東京 and 🙂",
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
MAX_POSITIONS = 256


def make_tokenizer(*, template: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens: `<s>` 0, `</s>` 1, `<pad>` 2."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", **({"pad_token": "<pad>"} if pad else {})
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_folder(folder: Path, *, template: bool = True, **overrides) -> Path:
    """A random Llama in float64 and its tokenizer, ready for `from_pretrained`."""
    tokenizer = make_tokenizer(template=template)
    values = dict(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=MAX_POSITIONS, pad_token_id=2)
    model = tiny_model(**{**values, **overrides})
    model.generation_config.eos_token_id = [1]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Numbers:
    """A tokenizer whose text is the token ids, none of them special."""

    added_tokens_decoder: dict = {}
    all_special_ids: list = []
    all_special_tokens: list = []

    def decode(self, ids, **kwargs) -> str:
        return "".join(f"{i} " for i in ids)


def request(index: int, ids, max_new_tokens: int = 8, stop=()) -> Request:
    """A request of token ids."""
    return Request(index, f"row{index}", tuple(int(i) for i in ids), max_new_tokens, tuple(stop))
