"""Prompts in two pieces, truncation, and filling to a length."""

from __future__ import annotations

import itertools

import pytest

from d2o_dist.eval.encode import Encoder
from d2o_dist.eval.examples import Example
from d2o_dist.eval.fill import SLACK, largest_fit
from d2o_dist.eval.text import read_text, sentences, text_loader
from tests.engine.tiny import make_tokenizer

EXAMPLE = Example("r", "one two three four five six seven", "\nWhat is it?", ("x",), 4, prefix=" It is")


def text_of(tokenizer, encoded) -> str:
    return tokenizer.decode(list(encoded.ids), skip_special_tokens=False)


def test_bare_pieces_join_to_the_whole_text():
    tokenizer = make_tokenizer(template=False)
    encoded = Encoder(tokenizer).encode(EXAMPLE)
    assert text_of(tokenizer, encoded) == EXAMPLE.context + EXAMPLE.question + EXAMPLE.prefix
    assert tokenizer.decode(list(encoded.context)) == EXAMPLE.context


def test_templated_pieces_join_to_the_rendered_text():
    tokenizer = make_tokenizer()
    encoded = Encoder(tokenizer, system_prompt="be brief").encode(EXAMPLE)
    expected = "<s>system: be brief</s><s>user: one two three four five six seven\nWhat is it?</s><s>assistant:  It is"
    assert text_of(tokenizer, encoded) == expected
    assert tokenizer.decode(list(encoded.context)).endswith("six seven")


def test_who_goes_through_the_template():
    tokenizer = make_tokenizer()
    bare = Encoder(make_tokenizer(template=False)).encode(EXAMPLE).ids
    assert Encoder(tokenizer).encode(EXAMPLE, template_allowed=False).ids == bare
    assert Encoder(tokenizer, chat_template="never").encode(EXAMPLE).ids == bare
    assert Encoder(tokenizer, chat_template="always").encode(EXAMPLE, template_allowed=False).ids != bare
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(make_tokenizer(template=False), chat_template="always")


def test_a_template_that_changes_the_text_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="row r: the chat template changes the text"):
        Encoder(tokenizer).encode(EXAMPLE)


def test_the_middle_of_the_context_is_cut():
    tokenizer = make_tokenizer(template=False)
    whole = Encoder(tokenizer).encode(EXAMPLE)
    limit = len(whole.ids) - 5
    cut = Encoder(tokenizer, max_prompt_tokens=limit).encode(EXAMPLE)
    assert len(cut.ids) == limit and cut.num_cut == 5 and cut.question == whole.question
    tail = len(cut.context) // 2
    assert cut.context == whole.context[: len(cut.context) - tail] + whole.context[-tail:]
    by_positions = Encoder(tokenizer, max_positions=limit + EXAMPLE.max_new_tokens).encode(EXAMPLE)
    assert by_positions == cut
    assert Encoder(tokenizer, max_prompt_tokens=len(whole.ids)).encode(EXAMPLE) == whole


def test_refusals():
    tokenizer = make_tokenizer(template=False)
    count = len(Encoder(tokenizer).encode(EXAMPLE).ids)
    with pytest.raises(ValueError, match=rf"row r: the prompt has {count} tokens, above the limit of {count - 1}"):
        Encoder(tokenizer, max_prompt_tokens=count - 1, truncation="error").encode(EXAMPLE)
    with pytest.raises(ValueError, match="the question alone has .* the limit is 10"):
        Encoder(tokenizer, max_prompt_tokens=10).encode(EXAMPLE)
    with pytest.raises(ValueError, match="the context has no tokens"):
        Encoder(tokenizer).encode(Example("r", "", "a question", ("x",), 4))


@pytest.mark.parametrize("limit", [10, 50, 51, 333, 5000])
@pytest.mark.parametrize("per_piece", [lambda n: 3, lambda n: n % 7, lambda n: 40 if n == 20 else 1])
def test_largest_fit_against_a_search(limit, per_piece):
    lengths = list(itertools.accumulate((per_piece(n) for n in range(6000)), initial=10))
    calls = []

    def tokens(count: int) -> int:
        calls.append(count)
        return lengths[count]

    found = largest_fit(tokens, limit, most=6000, what="row")
    best = max(n for n in range(6000) if lengths[n] <= limit)
    assert tokens(found) <= limit and (found == best or limit - tokens(found) <= SLACK)
    assert len(calls) < 45


def test_largest_fit_refusals():
    with pytest.raises(ValueError, match=r"row: the prompt without text has 9 tokens, above its length \(8\)"):
        largest_fit(lambda n: 9 + n, 8, most=5, what="row")
    with pytest.raises(ValueError, match=r"row: all 5 pieces of text give 14 tokens, short of its length \(100\)"):
        largest_fit(lambda n: 9 + n, 100, most=5, what="row")
    assert largest_fit(lambda n: 9 + 100 * n, 510, most=5, what="row") == 5


def test_texts(tmp_path):
    (tmp_path / "b.txt").write_text("Second. Text!")
    (tmp_path / "a.txt").write_text("First   one?\nYes.")
    load = text_loader({"named": lambda: "by name"})
    assert load("named") == "by name"
    assert sentences(load(str(tmp_path))) == ["First one?", "Yes.", "Second.", "Text!"]
    with pytest.raises(ValueError, match="does not exist"):
        load(str(tmp_path / "c.txt"))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="bad.txt cannot be read"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="has no .txt file"):
        (tmp_path / "empty").mkdir()
        read_text(tmp_path / "empty")


def test_a_row_of_too_many_bytes_or_half_a_character_is_refused():
    encoder = Encoder(make_tokenizer(template=False), max_prompt_bytes=40)
    assert encoder.encode(EXAMPLE)
    for context, words in (("long " * 9, r"45 bytes, above max_prompt_bytes \(40\)"), ("\ud800", "half a surrogate")):
        with pytest.raises(ValueError, match=words):
            encoder.encode(Example("r", context, "\nWhat is it?", ("x",), 4))
