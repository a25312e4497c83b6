"""From rows to ids: templates, truncation, and limits that name their numbers."""

from __future__ import annotations

import pytest

from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.encode import Request, encode_row
from d2o_dist.engine.prompts import PromptRow
from d2o_dist.models.shape import ModelShape
from tests.engine.tiny import make_tokenizer

TOKENIZER, BARE = make_tokenizer(), make_tokenizer(template=False)
CHAT = ({"role": "user", "content": "one two"},)


def limits(max_positions, vocab_size) -> ModelShape:
    """A model of these limits."""
    return ModelShape((None,), 4, 2, 16, vocab_size=vocab_size, max_positions=max_positions)


ROOMY = limits(10_000, 320)


def encode(row: PromptRow, *, tokenizer=TOKENIZER, limits=ROOMY, new: int = 8, **fields):
    values = {"model": "m", "sampling": {"max_new_tokens": new}, **fields}
    return encode_row(row, tokenizer, InferConfig.from_dict(values), limits)


def text_of(result) -> str:
    assert isinstance(result, Request), result
    return TOKENIZER.decode(list(result.input_ids))


PROMPT = PromptRow(0, "a", prompt="one two")
MESSAGES = PromptRow(0, "a", messages=CHAT)


def test_templates():
    chat = "<s>user: one two</s><s>assistant: "
    assert text_of(encode(PROMPT)) == chat
    assert text_of(encode(MESSAGES)) == chat
    assert text_of(encode(PROMPT, chat_template="always")) == chat
    assert text_of(encode(PROMPT, chat_template="never")) == "one two"
    assert text_of(encode(PROMPT, tokenizer=BARE)) == "one two"


def test_system_prompt_and_continued_answer():
    assert text_of(encode(PROMPT, system_prompt="be kind")).startswith("<s>system: be kind</s><s>user: ")
    own = ({"role": "system", "content": "mine"}, *CHAT)
    assert text_of(encode(PromptRow(0, 0, messages=own), system_prompt="be kind")).count("system") == 1
    begun = (*CHAT, {"role": "assistant", "content": "three fo"})
    assert text_of(encode(PromptRow(0, 0, messages=begun))).endswith("<s>assistant: three fo")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (MESSAGES, {"tokenizer": BARE}, "the row has messages, but the tokenizer has no chat template"),
        (MESSAGES, {"chat_template": "never"}, 'the row has messages, but chat_template is "never"'),
        (PROMPT, {"tokenizer": BARE, "chat_template": "always"}, "but the tokenizer has no chat template"),
        (PROMPT, {"tokenizer": BARE, "system_prompt": "x"}, "system_prompt is given, but the tokenizer has no chat"),
        (PromptRow(0, 0, messages=({"role": "tool", "content": ""},)), {}, "the chat template failed: no tools here"),
        (PromptRow(0, 0, error="line 3: bad"), {}, "line 3: bad"),
        (PROMPT, {"limits": limits(20, None)}, "has 27 tokens and max_new_tokens is 8: together above the model's "
         "max_position_embeddings (20)"),
        (PROMPT, {"limits": limits(8, None)}, "max_new_tokens (8) leaves no room for a prompt"),
        (PROMPT, {"max_prompt_tokens": 5}, "has 27 tokens, above max_prompt_tokens (5)"),
        (PROMPT, {"limits": limits(None, 50)}, "is outside the model's vocabulary (50)"),
    ],
)  # fmt: skip
def test_refusals(row, options, message):
    result = encode(row, **options)
    assert not isinstance(result, Request)
    count = len(TOKENIZER(text_of(encode(PROMPT)))["input_ids"])
    assert message.replace("27", str(count)) in result.error


def test_an_empty_prompt_is_refused():
    result = encode(PromptRow(0, 0, prompt="x"), tokenizer=lambda text, **kwargs: {"input_ids": []})
    assert result.error == "the prompt has no tokens"


def test_truncation():
    row = PromptRow(0, 0, prompt="abcdefghijklmnopqrstuvwxyz")
    whole = encode(row, chat_template="never").input_ids
    for how, limit, expected in [
        ("left", 5, whole[-5:]), ("middle", 5, whole[:3] + whole[-2:]), ("middle", 1, whole[:1]), ("left", 99, whole),
    ]:  # fmt: skip
        cut = encode(row, chat_template="never", truncation=how, max_prompt_tokens=limit)
        assert cut.input_ids == expected, (how, limit)
    # Without a limit of one's own, the model's positions are it.
    assert len(encode(row, chat_template="never", truncation="left", limits=limits(15, 320)).input_ids) == 7


def test_a_row_has_limits_of_its_own():
    row = PromptRow(4, "x", prompt="one two three", max_new_tokens=3, max_prompt_tokens=2, stop=("z",))
    result = encode(row, chat_template="never", truncation="left", max_prompt_tokens=50, sampling={"stop": "y"})
    assert (len(result.input_ids), result.max_new_tokens, result.stop, result.index) == (2, 3, ("z",), 4)


class Untouched:
    """A tokenizer that must not be asked: 50 MB of text took it 6.7 GB of memory."""

    chat_template = None

    def __call__(self, *args, **kwargs):
        raise AssertionError("tokenized")


def test_a_row_of_too_many_bytes_is_refused_before_it_is_tokenized():
    found = encode(PromptRow(0, "a", prompt="ü" * 25_000_000), tokenizer=Untouched(), truncation="left")
    assert found.error == "the prompt has 50000000 bytes, above max_prompt_bytes (8388608): shorten it or raise that"


def test_bytes_are_counted_with_the_template():
    size = len("<s>user: one two</s><s>assistant: ")
    assert isinstance(encode(PROMPT, max_prompt_bytes=size), Request)
    assert f"the prompt has {size} bytes" in encode(PROMPT, max_prompt_bytes=size - 1).error
